import pytest
import yaml

from fastvitc.errors import UsageError
from fastvitc.programs.train import read_settings


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def settings_of(*args):
    return read_settings([*map(str, args)])[0].to_dict()


@pytest.fixture
def config(tmp_path):
    """Writes settings to a file."""

    def write(values):
        path = tmp_path / "args.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write


def test_a_file_of_settings_comes_before_the_recipe_and_after_the_flags(config):
    path = config({"recipe": "small", "data_dir": "images", "epochs": 7, "lr": 0.5, "output": "old"})
    found = settings_of("--config", path, "--lr", 0.25)
    assert (found["recipe"], found["epochs"], found["lr"], found["mixup"]) == ("small", 7, 0.25, 0.2)
    assert (found["data_dir"], found["output"]) == ("images", None)


def test_the_settings_of_a_run_are_such_a_file(config):
    args = ["--data-dir", "images", "-b", 8, "--model-ema", "--crop-scale", 0.5, 0.75, "--wandb", "mine"]
    before = settings_of(*args)
    path = config(before)
    assert settings_of("--config", path) == {**before, "config": str(path)}
    assert settings_of("--config", path, "-b", 4, "--no-model-ema")["batch_size"] == 4
    assert not settings_of("--config", path, "--no-model-ema")["model_ema"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: [1", "cannot read the settings in"),
        ("- epochs", "holds no settings"),
        ("img_size: 64", "there is no flag --img-size; use --image-size"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(text, words, config):
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        settings_of("--config", config(text))


def test_a_missing_file_and_a_resumed_run_are_refused(config, tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        settings_of("--config", tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="a resumed run keeps its settings; leave out --config"):
        settings_of("--config", config({"epochs": 3}), "--resume", tmp_path)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--img-size", "use --image-size"),
        ("--model_ema_decay", "use --model-ema-rate, which is 1 minus the decay"),
        ("--crop-pct=0.9", "use --crop-ratio"),
        ("--bach-size", "did you mean --batch-size"),
        ("--xyzzy", "fastvitc-train --help lists all"),
    ],
)
def test_an_unknown_flag_names_what_to_use(flag, words):
    with pytest.raises(UsageError, match=f"there is no flag --[a-z-]+; {words}"):
        settings_of(flag, "1")


def test_timms_names_mean_ours():
    found = settings_of("--amp-dtype", "float16", "-vb", 5, "--checkpoint-hist", 4, "--log-interval", 9)
    assert (found["precision"], found["validation_batch_size"]) == ("fp16", 5)
    assert (found["keep"], found["log_every"]) == (4, 9)
    assert settings_of("--amp-dtype=bfloat16")["precision"] == "bf16"


def test_an_experiment_is_a_folder_in_the_output():
    for args, folder in ((["-o", "all"], "all/a"), ([], "runs/a")):
        assert read_settings([*args, "--experiment", "a"])[0].run.folder() == folder
    assert read_settings(["-o", "all"])[0].run.folder() == "all"


def test_log_wandb_is_a_project():
    assert read_settings(["--log-wandb"])[0].run.board() == "fastvitc"
    assert read_settings(["--log-wandb", "--wandb", "mine"])[0].run.board() == "mine"
    assert read_settings([])[0].run.board() is None
