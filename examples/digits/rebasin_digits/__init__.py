"""A Flower App: a small MLP for scikit-learn's digits, trained with FedAvg of aligned models."""
