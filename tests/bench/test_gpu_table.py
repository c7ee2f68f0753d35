from bench.gpu.measure import OUT_OF_TIME
from bench.gpu.table import Row, rows, table

ENTRY = {
    "title": "stem, m, forward",
    "contest": "stem, m, batch 8, forward",
    "state": "measured",
    "planned_batch": 16,
    "batch": 8,
    "images": 8,
    "flops": 2e9,
    "bytes": 6e9,
    "contenders": {
        name: {
            "state": "measured",
            "times": times,
            "host_seconds": 0.5,
            "peak_bytes": 3_000_000_000,
            "parity_error": 0.001,
        }
        for name, times in {
            "fastvitc triton": [1.0, 2.0, 4.0],
            "timm": [2.0, 3.0, 4.0],
            "slow": [9.0, 9.0, 9.0],
        }.items()
    }
    | {"fastvitc bn_relu": {"state": "wrong", "reason": "off"}},
}


def test_the_tables_figures_follow_from_median_times():
    first, second, third = rows(ENTRY, flops_peak=1e10)
    assert first == Row("fastvitc triton", 2.0, 0.5, 4.0, 0.1, 3.0, 3.0, 1.5, 0.001)  # ratios 2, 3/2, 1
    assert (second.contender, second.ratio, second.images_per_second) == ("timm", 1.0, 8 / 3)
    assert third.ratio == 3 / 9


def test_the_table_says_what_was_not_measured_and_which_batch_was():
    machine = {"device": "abacus", "nvidia_smi": None, "versions": {"torch": "2"}, "copy_peak": 5e9}
    machine |= {"flops_peak": 1e10, "flops_peak_source": "made up"}
    tests = {"state": "measured", "reason": "stopped", "passed": 7, "failed": 1, "skipped": 0}
    tests["failures"] = [{"name": "test_x", "message": "long\nE assert 1 == 2"}]
    missing = {
        "title": "stem, n, forward",
        "planned_batch": 2,
        "state": "not measured",
        "reason": OUT_OF_TIME,
    }
    results = {"label": "Measured", "settings": "", "machine": machine, "kernel_tests": tests}
    text = table({**results, "entries": [ENTRY, missing]})
    assert "| **fastvitc triton** | 2000.000 | 500.000 | 4 | 10.0% | 3 | 3.00 | 1.50 | 1.0e-03 |" in text
    assert "- fastvitc bn_relu: wrong: off" in text
    assert "Batch 8: 16 did not fit in memory." in text
    assert "### stem, n, forward\n\n- not measured: out of time" in text
    assert "7 passed, 1 failed, 0 skipped\nmeasured: stopped\n- test_x: E assert 1 == 2" in text
