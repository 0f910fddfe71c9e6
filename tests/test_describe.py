"""The command line: what it prints to stdout and stderr, and its exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import squeezenet1_1

from fl_rebasin import derive_spec, spec_from_json
from fl_rebasin.describe import main

SMALL = ("torchvision:squeezenet1_1", "--input", "1,3,64,64")

MODELS = '''
"""Models to describe."""

import warnings

import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 3)

    def forward(self, inputs):
        return self.second(self.first(inputs).relu())


class Spare(Plain):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(6, 6)


class Words(Plain):
    """Takes token indices and float weights."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, tokens, weights):
        return super().forward(self.embed(tokens) * weights)


class NeedsArguments(Plain):
    def __init__(self, config):
        super().__init__(config.width)


class Warning(Plain):
    def __init__(self):
        super().__init__()
        warnings.warn("weights\\nare fresh", stacklevel=2)


class Broken(Plain):
    def forward(self, inputs):
        warnings.warn("on the way", stacklevel=2)
        raise RuntimeError("no\\nforward")


class Failing:
    def __init__(self):
        raise RuntimeError("no weights\\nin this folder")


class Wordless:
    def __init__(self):
        raise KeyError()


class Family:
    @staticmethod
    def member():
        return Plain(5)


def pair():
    return Plain(), torch.zeros(2, 4)


def keywords():
    return Words(), {"tokens": torch.zeros(1, 2, dtype=torch.int64), "weights": torch.zeros(1)}


def triple():
    return Plain(), torch.zeros(2, 4), 3


def text():
    return "a model"


def pair_of_texts():
    return "a model", "inputs"


instance = Plain(7)
number = 3
'''


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of an importable module with models."""
    name = "models_of_test_describe"
    (tmp_path / f"{name}.py").write_text(MODELS)
    (tmp_path / "torn_of_test_describe.py").write_text("def torn(:\n")
    (tmp_path / "raising_of_test_describe.py").write_text("raise OSError(5, 'no disk')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in [name, "torn_of_test_describe", "raising_of_test_describe"]:
        monkeypatch.delitem(sys.modules, module, raising=False)
    return name


def assert_error(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Check for one line on stderr that says what is wrong, and for exit code 2."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_a_torchvision_model_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out == f"{derive_spec(squeezenet1_1(), torch.zeros(1, 3, 64, 64))}\n"
    assert "classifier.1.weight[0]" in out


def test_a_backbone_is_not_downloaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are requested")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    name = "torchvision:lraspp_mobilenet_v3_large"
    assert main([name, "--input", "1,3,64,64"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "backbone.0.0" in out


@pytest.mark.parametrize(
    ("member", "inputs", "group"),
    [
        ("Plain", ["2,4"], "first     6  first.weight[0]"),
        ("Plain", ["2,4:float64"], "first     6  first.weight[0]"),
        ("Plain", ["2,4:bfloat16"], "first     6  first.weight[0]"),
        ("Family.member", ["1,4"], "first     5  first.weight[0]"),
        ("instance", ["1,4"], "first     7  first.weight[0]"),
        ("pair", [], "first     6  first.weight[0]"),
        ("pair", ["3,4"], "first     6  first.weight[0]"),
        ("keywords", [], "first#2     4  first.weight[1], embed.weight[1]"),
        ("keywords", ["2,3:int64", "4"], "first     6  first.weight[0]"),
        ("Words", ["2,3:int32", "2,3,1"], "first#2     4  first.weight[1], embed.weight[1]"),
    ],
)
def test_a_users_model_is_described(
    member: str, inputs: list[str], group: str, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for text in inputs for part in ("--input", text)]
    assert main([f"{models}:{member}", *options]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert group in out


@pytest.mark.parametrize(
    ("member", "inputs", "words"),
    [
        ("NeedsArguments", [], "TypeError: NeedsArguments.__init__() missing 1"),
        ("Failing", [], "RuntimeError: no weights in this folder"),
        ("Wordless", [], "cannot be called without arguments: KeyError"),
        ("number", [], "cannot be called without arguments: TypeError: 'int' object"),
        ("text", [], "returns a str, not a torch.nn.Module"),
        ("triple", [], "returns a tuple, not a torch.nn.Module"),
        ("pair_of_texts", [], "returns a str, not a torch.nn.Module"),
        ("gone", [], "cannot be imported: AttributeError"),
        ("Family.gone", [], "cannot be imported: AttributeError"),
        ("Plain", ["2,5"], "cannot be run on the example inputs"),
        ("Plain", ["2,4", "2,4"], "takes 2 positional arguments but 3 were given"),
        ("Words", ["2,3:int64"], "missing 1 required positional argument: 'weights'"),
        ("Plain", [], "cannot be run on the example inputs (1, 3, 224, 224) float32 on cpu"),
    ],
)
def test_a_model_that_cannot_be_described_gives_one_line(
    member: str, inputs: list[str], words: str, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [part for text in inputs for part in ("--input", text)]
    assert_error(capsys, [f"{models}:{member}", *options], words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet1", "torchvision has no model 'resnet1'"),
        ("resnet18", "'resnet18': give torchvision:MODEL or MODULE:CALLABLE"),
        ("torchvision:", "give torchvision:MODEL or MODULE:CALLABLE"),
        (":Plain", "give torchvision:MODEL or MODULE:CALLABLE"),
        ("", "give torchvision:MODEL or MODULE:CALLABLE"),
        ("gone_of_test_describe:Plain", "ModuleNotFoundError: No module named 'gone_of_test"),
        (".relative:Plain", "'.relative:Plain' cannot be imported"),
        ("torn_of_test_describe:Plain", "cannot be imported: SyntaxError"),
        ("raising_of_test_describe:Plain", "cannot be imported: OSError: [Errno 5] no disk"),
    ],
)
def test_an_unknown_model_gives_one_line(
    name: str, words: str, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_error(capsys, [name], words)


@pytest.mark.parametrize(
    "text",
    ["", "a", "1,,3", "1.5,3", "0,3", "-1,3", "1,3:float31", "1,3:nn", "1x3", "(1,3)", ":int64"],
)
def test_an_error_about_inputs_shows_valid_ones(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input {text!r}: give sizes and a dtype, as in 1,3,32,32 or 2,16:int64"
    assert_error(capsys, ["torchvision:squeezenet1_1", f"--input={text}"], words)


@pytest.mark.parametrize("text", ["999999999999,9999999", "9" * 30])
def test_inputs_that_cannot_be_created_give_one_line(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--input '{text}': cannot create this tensor: "
    assert_error(capsys, ["torchvision:squeezenet1_1", "--input", text], words)


def test_a_missing_model_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "the following arguments are required: model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("Spare", "warning: 2 parameters are not used on the example inputs"),
        ("Warning", "warning: weights are fresh"),
    ],
)
def test_warnings_go_to_stderr_one_line_each(
    member: str, words: str, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{models}:{member}", "--input", "2,4"]) == 0
    out, err = capsys.readouterr()
    assert "first     6  first.weight[0]" in out
    assert len(err.splitlines()) == 1
    assert err.startswith(words)


def test_warnings_come_before_an_error(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{models}:Broken", "--input", "2,4"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(":")[0] for line in err.splitlines()] == ["warning", "error"]
    assert "on the way" in err.splitlines()[0]
    assert err.splitlines()[1].endswith("no forward")


def test_the_spec_is_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spec.json"
    file.write_text("earlier content")
    assert main([*SMALL, "--json", str(file)]) == 0
    spec = spec_from_json(file.read_text(), squeezenet1_1())
    assert capsys.readouterr().out == f"{spec}\n"
    assert spec == derive_spec(squeezenet1_1(), torch.zeros(1, 3, 64, 64))


def test_a_file_that_cannot_be_written_gives_one_line(
    tmp_path: Path, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    for file, words in [
        (tmp_path / "gone" / "spec.json", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ]:
        arguments = [f"{models}:pair", "--json", str(file)]
        assert_error(capsys, arguments, f"--json {file}: {words}")
    assert [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before


def test_without_a_spec_no_file_is_written(
    tmp_path: Path, models: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "spec.json"
    assert_error(
        capsys, [f"{models}:Plain", "--input", "2,5", "--json", str(file)], "cannot be run on"
    )
    assert not file.exists()


def test_the_program_runs(models: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fl_rebasin.describe"]
    root = str(Path(__file__).parents[1])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": root},
        )

    good = run(f"{models}:pair", "--json", "spec.json")
    assert (good.returncode, good.stderr) == (0, "")
    assert "first     6  first.weight[0]" in good.stdout
    assert f"{spec_from_json((tmp_path / 'spec.json').read_text())}\n" == good.stdout
    bad = run(f"{models}:Failing")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert len(bad.stderr.splitlines()) == 1
