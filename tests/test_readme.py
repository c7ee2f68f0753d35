import re


def test_the_readmes_python_runs_and_gives_the_shapes_it_names(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (2, 10)
    assert names["answers"].shape == (8, 1000)
    assert names["tokens"].shape == (2, 196, 384)


def test_the_readmes_models_have_the_counts_it_prints(request):
    from fastvitc import complexity

    text = (request.config.rootpath / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"`(vit\w+)` \| ([\d,]+) \| ([\d.]+) \| ([\d.]+)", text)
    assert len(rows) == 10
    for name, params, gflops, acts in rows:
        counts = complexity(name)
        printed = f"{counts.params:,}", f"{counts.flops / 1e9:.4f}", f"{counts.acts / 1e6:.3f}"
        assert printed == (params, gflops, acts)
