from running import program


def test_info_lists_versions_backends_and_models():
    done = program("info")
    assert done.returncode == 0, done.stderr
    for words in ("torch", "attention: auto takes native", "vitc_36gf", "167,796,008", "35.0258"):
        assert words in done.stdout
