"""fastvitc-train and fastvitc-evaluate on tar shards."""

import pytest
from packing import pack_folder
from running import SMALL, said, train, weights_hash

from fastvitc.programs import evaluate as evaluate_program
from fastvitc.programs import train as train_program
from fastvitc.training.state import newest_state, state_files


@pytest.fixture(scope="module")
def shards(few_digits, tmp_path_factory):
    return pack_folder(few_digits, tmp_path_factory.mktemp("shards"), "cls")


def test_a_run_on_shards_ends_with_the_weights_of_one_on_their_folder(shards, finished, tmp_path):
    train(shards, "-o", tmp_path / "run")
    assert weights_hash(tmp_path / "run") == weights_hash(finished[0])
    said_of_it = said(evaluate_program, tmp_path / "run" / "last", "--data-dir", shards, "--workers", "0")
    assert "of 15)" in said_of_it


@pytest.mark.parametrize("data", ["folder", "shards"])
def test_a_run_goes_on_over_shards_in_the_middle_of_an_epoch(data, shards, few_digits, finished, tmp_path):
    begin = few_digits if data == "folder" else shards
    train(begin, "-o", tmp_path, "--save-every", 1, "--keep", 100)
    for later in state_files(tmp_path):
        state = newest_state(later)[1]
        if (state.epoch, state.step) > (1, 1):
            later.unlink()
    assert (newest_state(tmp_path)[1].epoch, newest_state(tmp_path)[1].step) == (1, 1)
    said(train_program, "--resume", tmp_path, "--data-dir", shards)
    assert weights_hash(tmp_path) == weights_hash(finished[0])


def test_a_damaged_shard_ends_in_one_message_and_code_1(few_digits, tmp_path, ends):
    data = pack_folder(few_digits, tmp_path / "data", "folders")
    shard = data / "train" / "001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    code, message = ends(
        train_program, "--data-dir", data, "--model", "vitc_nano", *SMALL, "-o", tmp_path / "run"
    )
    assert (code, "train/001.tar is cut off at" in message) == (1, True), message
    assert not (tmp_path / "run").exists()
