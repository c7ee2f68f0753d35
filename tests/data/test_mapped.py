import multiprocessing
import pickle

import numpy as np
import pytest

from fastvitc.data.mapped import map_array
from fastvitc.data.names import Names
from fastvitc.data.store import IndexWriter, read_columns


def total(array, results):
    results.put((int(array.sum()), type(array).__name__))


@pytest.fixture
def array(tmp_path):
    (tmp_path / "numbers").write_bytes(np.arange(1000, dtype=np.int32).tobytes())
    mapped = map_array(tmp_path / "numbers", np.int32)
    (tmp_path / "numbers").unlink()
    return mapped


def test_an_array_outlives_its_file_and_cannot_be_written(array):
    assert array.sum() == 499_500
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_process_maps_the_file_again_however_it_is_started(method, array):
    context = multiprocessing.get_context(method)
    results = context.SimpleQueue()
    process = context.Process(target=total, args=(array, results))
    process.start()
    assert results.get() == (499_500, "Mapped")
    process.join()


def test_pickled_is_the_open_file_and_not_the_content(array):
    again = pickle.dumps(array)
    assert len(again) < 1000
    assert pickle.loads(again).sum() == 499_500


def test_a_part_of_an_array_is_pickled_with_its_content(array):
    assert pickle.loads(pickle.dumps(array[10:13])).tolist() == [10, 11, 12]


def test_names_come_back_as_they_were_written(tmp_path):
    given = ["cat/1.jpg", "", "bee/ü.jpg", "bad\udcff.jpg"]
    with IndexWriter(tmp_path, "val") as writer:
        writer.add(np.array([0, 0]), given[:2])
        writer.add(np.array([1, 1]), given[2:])
    labels, names, places = read_columns(tmp_path, "val")
    assert isinstance(names, Names)
    assert [names[n] for n in range(len(names))] == given
    assert (labels.tolist(), len(places)) == ([0, 0, 1, 1], 0)
