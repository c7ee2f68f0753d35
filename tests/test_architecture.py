from importlinter.cli import lint_imports


def test_imports_follow_the_layers(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert lint_imports(no_cache=True) == 0
