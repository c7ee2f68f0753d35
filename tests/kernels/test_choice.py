"""Which backend runs: names, mappings, and the file of what was measured."""

import errno
import json
import subprocess
import sys

import pytest
import torch

import fastvitc
from fastvitc.errors import UsageError
from fastvitc.kernels import (
    BackendUnavailable,
    Measured,
    attention,
    availability,
    chosen,
    measured,
    record,
)
from fastvitc.kernels.choice import measured as measured_choices
from fastvitc.kernels.choice.backends import parsed

CPU = torch.device("cpu")
FLASH = Measured(
    "flash",
    {"torch": 2.0, "flash": 1.0, "triton": None},
    {"model": "vitc_4gf", "batch_size": 64, "dtype": "bfloat16", "image_size": [224, 224], "compile": True},
)


def forget():
    """What another process would know: nothing but the file."""
    measured_choices._known.clear()


def rewrite(change):
    path = measured_choices.choices_file()
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    forget()


def test_without_a_measurement_auto_takes_the_first_of_the_order():
    assert chosen() == dict.fromkeys(chosen(), "native")
    assert list(availability()["attention"])[:3] == ["native", "torch", "flash"]


def test_a_measurement_comes_back_and_auto_takes_it(cache):
    record(CPU, torch.bfloat16, {"attention": FLASH})
    for _ in range(2):
        assert measured(CPU, torch.bfloat16) == {"attention": FLASH}
        assert chosen(dtype=torch.bfloat16)["attention"] == "flash"
        assert chosen(backend={"conv_stem": "reference"})["attention"] == "flash"
        assert chosen(backend={"attention": "torch"})["attention"] == "torch"
        forget()
    assert {p.name for p in cache.iterdir()} - {"native", "backends.lock"} == {"backends.json"}


def test_a_measurement_holds_for_its_dtype_and_the_last_one_where_none_is_named():
    record(CPU, torch.bfloat16, {"attention": FLASH})
    assert chosen(dtype=torch.float32)["attention"] == "native"
    record(CPU, torch.float32, {"attention": Measured("triton", {"triton": 1.0}, {})})
    forget()
    assert chosen()["attention"] == "triton"
    record(CPU, torch.bfloat16, {"attention": FLASH})
    forget()
    assert chosen()["attention"] == "flash"
    assert chosen(dtype=torch.float32)["attention"] == "triton"


def test_ops_and_dtypes_are_recorded_beside_each_other():
    stem = Measured("torch", {"torch": None}, {})
    record(CPU, torch.bfloat16, {"attention": FLASH})
    forget()
    record(CPU, torch.bfloat16, {"conv_stem": stem})
    forget()
    assert measured(CPU, torch.bfloat16) == {"attention": FLASH, "conv_stem": stem}


def test_the_op_runs_what_was_measured_for_its_dtype(monkeypatch):
    from fastvitc.kernels.attention import library

    ran = []
    original = library.attention
    monkeypatch.setattr(library, "attention", lambda *args: ran.append(args[-1]) or original(*args))
    record(CPU, torch.bfloat16, {"attention": FLASH})
    for dtype in (torch.bfloat16, torch.float32):
        attention(torch.zeros(1, 2, 48, dtype=dtype), 2)
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.zeros(1, 2, 48), 2)
    assert ran == ["flash", "flash"]  # float32 went to the first of the order


@pytest.mark.parametrize("what", ["device", "torch", "triton"])
def test_another_device_or_version_is_not_measured_yet(what, monkeypatch):
    record(CPU, torch.bfloat16, {"attention": FLASH})
    forget()
    if what == "device":
        monkeypatch.setattr(measured_choices, "cpu_name", lambda: "another")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(measured_choices, "version", lambda package: "9.9")
    assert measured(CPU) == {}
    assert chosen()["attention"] == "native"


def test_a_measured_backend_that_cannot_run_any_more_gives_way_to_the_order():
    for name in ("cudnn", "gone"):
        record(CPU, torch.bfloat16, {"attention": Measured(name, {name: 1.0}, {})})
        assert chosen()["attention"] == "native"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff\x00",
        b'{"cpu": 3}',
        b'{"cpu": {"float32": {"attention": {"backend": 1}}}}',
        b'{"cpu": {"float32": {"attention": {"backend": 1, "milliseconds": {}, "subject": {}}}}}',
    ],
)
def test_a_broken_file_warns_once_with_what_to_do_and_is_mended_by_the_next_measurement(content, cache):
    (cache / "backends.json").write_bytes(content)
    with pytest.warns(UserWarning, match="fixed order holds. Run fastvitc-tune to measure again, or delete"):
        assert chosen()["attention"] == "native"
    assert chosen()["attention"] == "native"
    with pytest.warns(UserWarning, match="cannot read the measured backends"):
        record(CPU, torch.bfloat16, {"attention": FLASH})
    forget()
    assert chosen()["attention"] == "flash"


def test_a_file_that_cannot_be_written_warns_and_the_measurement_holds_for_the_process(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("FASTVITC_CACHE", str(cache / "file" / "below"))
    with pytest.warns(UserWarning, match="Set FASTVITC_CACHE to a writable folder"):
        record(CPU, torch.bfloat16, {"attention": FLASH})
    assert chosen()["attention"] == "flash"


def test_the_file_is_read_once(monkeypatch):
    record(CPU, torch.bfloat16, {"attention": FLASH})
    forget()
    read, original = [], measured_choices._read
    monkeypatch.setattr(measured_choices, "_read", lambda path: read.append(path) or original(path))
    for _ in range(3):
        attention(torch.zeros(1, 2, 48), 2)
    assert read == [measured_choices.choices_file()]


def test_a_gpu_has_its_own_measurements(monkeypatch):
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 1,
        "get_device_name": lambda device: f"GPU {device}",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    record(CPU, torch.bfloat16, {"attention": FLASH})
    record(torch.device("cuda"), torch.bfloat16, {"attention": Measured("cudnn", {"cudnn": 1.0}, {})})
    assert measured(torch.device("cuda", 1))["attention"].backend == "cudnn"
    assert measured(torch.device("cuda", 0)) == {}
    assert chosen("cuda:1")["attention"] == "cudnn"
    keys = list(json.loads(measured_choices.choices_file().read_text()))
    assert keys[0].startswith("cpu: ")
    assert keys[1].startswith("GPU cuda, torch ")


def test_without_a_gpu_nothing_is_measured_on_it():
    if not torch.cuda.is_available():
        assert measured(torch.device("cuda")) == {}


def test_the_compiled_op_takes_the_measured_backend_as_a_constant():
    record(CPU, torch.float32, {"attention": FLASH})
    qkv = torch.randn(2, 5, 48)
    compiled = torch.compile(lambda x: attention(x, 2, backend={"conv_stem": "torch"}), fullgraph=True)
    torch.testing.assert_close(compiled(qkv), attention(qkv, 2, backend="flash"))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("auto", ("auto", "auto")),
        ("torch", ("torch", "torch")),
        ({"attention": "flash"}, ("flash", "auto")),
        ({}, ("auto", "auto")),
        ("attention=flash", ("flash", "auto")),
        ("attention=flash, conv_stem=reference", ("flash", "reference")),
    ],
)
def test_a_choice_is_one_name_or_a_name_per_op(choice, names):
    found = parsed(choice)
    assert (found["attention"], found["conv_stem"]) == names
    assert found.keys() == availability().keys()
    assert parsed(found) == found


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            {"atention": "flash"},
            "the op 'atention', which there is not; the ops are add_layer_norm, attention, ",
        ),
        ("attention=flash,torch", "the op 'torch', which there is not"),
        (None, "must be a name or a mapping"),
        ({"attention": None}, "must be a name or a mapping"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda choice: fastvitc.create_model("vitc_nano", backend=choice),
        lambda choice: attention(torch.zeros(1, 2, 48), 2, backend=choice),
        lambda choice: chosen("cpu", choice),
    ],
    ids=["model", "op", "chosen"],
)
def test_a_choice_that_cannot_be_raises_one_clear_error(choice, words, use):
    with pytest.raises(UsageError, match=words):
        use(choice)


def test_a_model_gives_each_op_its_backend():
    model = fastvitc.create_model("vitc_nano", backend={"attention": "flash", "conv_stem": "reference"})
    assert {block.attn.backend for block in model.blocks} == {"flash"}
    assert model.stem.backend == "reference"
    assert fastvitc.create_model("vitc_nano", backend={"attention": "flash"}).stem.backend == "auto"
    image = torch.randn(1, 3, 32, 32)
    plain = fastvitc.create_model("vitc_nano", backend="reference").eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval().forward_features(image), plain.forward_features(image))


def test_an_unavailable_backend_of_a_mapping_names_the_usable_ones():
    with pytest.raises(
        BackendUnavailable, match=r"'cudnn' is not available on cpu: .*usable here: auto, native, torch"
    ):
        chosen("cpu", {"attention": "cudnn"})


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    from fastvitc.files import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("FASTVITC_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FASTVITC_CACHE")
    assert cache_folder() == tmp_path / "shared" / "fastvitc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastvitc"


def test_info_says_whether_auto_follows_a_measurement():
    from fastvitc.programs.info import InfoSettings, report

    assert "attention: auto takes native (the first of the order; not measured)" in report(
        InfoSettings("cpu")
    )
    record(CPU, torch.bfloat16, {"attention": FLASH})
    text = report(InfoSettings("cpu"))
    assert (
        "attention: auto takes flash (measured in bfloat16 on vitc_4gf, batch 64, 224x224: torch 2.000 ms, "
        "flash 1.000 ms)"
    ) in text


def test_processes_that_measure_at_once_lose_nothing(cache):
    code = "import sys, torch; from fastvitc.kernels import Measured, record; "
    code += "record(torch.device('cpu'), torch.float32, {sys.argv[1]: Measured('torch', {'torch': 1.0}, {})})"
    ops = ["attention", "conv_stem", "bn_relu"]
    others = [subprocess.Popen([sys.executable, "-c", code, op]) for op in ops]
    assert [other.wait(100) for other in others] == [0, 0, 0]
    forget()
    assert measured(CPU, torch.float32).keys() == set(ops)


def test_a_file_that_cannot_be_read_is_not_written_over_and_the_measurement_holds_here(cache, monkeypatch):
    record(CPU, torch.float32, {"attention": FLASH})
    before = measured_choices.choices_file().read_bytes()

    def fail(path):
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", fail)
        with pytest.warns(UserWarning, match="input/output error"):
            record(CPU, torch.float32, {"conv_stem": Measured("torch", {"torch": 1.0}, {})})
    assert measured(CPU, torch.float32).keys() == {"attention", "conv_stem"}
    assert measured_choices.choices_file().read_bytes() == before
