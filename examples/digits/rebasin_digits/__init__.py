"""A Flower App: scikit-learn's digits, a small MLP, FedAvg of aligned models."""
