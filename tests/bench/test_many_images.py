import re

import pytest

from bench import many_images
from bench.many_images import Machine, measure


@pytest.mark.slow
def test_the_ranks_and_workers_of_a_machine_hold_an_index_once():
    found = measure(Machine(images=200_000, classes=50, ranks=2, workers=1))
    assert found.files > 200_000 * (4 + 8 + len("n00000000/n00000000_0.JPEG"))
    assert found.mapped == pytest.approx(found.files, rel=0.05)
    assert 0 < found.begun < found.total
    assert found.builder < found.files


def test_the_table_has_megabytes_and_seconds(monkeypatch, capsys):
    found = many_images.Measured(1_000_000, 2_000_000, 3.0, 4_000_000, 5_000_000, 6_000_000, 7.0)
    monkeypatch.setattr(many_images, "measure", lambda machine: found)
    many_images.main(["--images", "123456", "--classes", "7", "--ranks", "3", "--workers", "1"])
    out = capsys.readouterr().out
    assert "123,456 images in 7 classes; 3 ranks with 1 workers each." in out
    assert re.findall(r"\| (\d+) \|", out) == ["1", "2", "5", "6", "4"]
    assert "Written in 3.0 s" in out
