from running import said

from fastvitc.programs import info


def test_info_lists_versions_backends_and_models():
    text = said(info)
    for words in ("torch", "attention: auto takes native", "vitc_36gf", "167,796,008", "35.0258"):
        assert words in text
