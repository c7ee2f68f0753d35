import numpy as np
import pytest

from bench import memory, resident

MEGABYTES = 64


def test_the_peak_of_a_call_holds_what_it_has_freed():
    base = resident.resident("VmRSS")
    peak = resident.peak(lambda: np.ones(MEGABYTES * 10**6, np.uint8))
    assert peak - base == pytest.approx(MEGABYTES * 1e6, rel=0.1)


def test_the_peak_of_an_earlier_call_is_forgotten():
    resident.peak(lambda: np.ones(MEGABYTES * 10**6, np.uint8))
    base = resident.resident("VmRSS")
    assert resident.peak(lambda: None) - base < 0.1 * MEGABYTES * 1e6


@pytest.mark.slow
def test_more_images_take_more_memory_in_a_fresh_process():
    few, many = (memory.measure("vitc_nano", batch_size, "timm") for batch_size in (2, 128))
    assert all(many > few > 0 for few, many in zip(few, many, strict=True))


def test_the_table_has_a_row_for_every_contender_in_megabytes(monkeypatch, capsys):
    monkeypatch.setattr(memory, "measure", lambda model, batch_size, contender: (1_234_000_000, 5_600_000))
    memory.main(["--model", "vitc_nano", "--batch-size", "2"])
    out = capsys.readouterr().out
    assert "training step, vitc_nano, batch 2" in out
    for contender in ("fastvitc", "fastvitc compiled", "timm", "torchvision compiled"):
        assert f"| {contender} | 1,234 | 6 |" in out
