"""The numbers of `examples/guides/how_often.md` are those that its code prints."""

from equipment import pages

PAGE = pages.GUIDES / "how_often.md"


def test_what_the_page_shows_is_what_its_code_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = pages.run(PAGE)
    printed = capsys.readouterr().out
    report, _, printed = printed.partition("\n")
    shown = [block.code for block in pages.blocks(PAGE) if block.language == "text"]
    assert len(shown) == 3
    assert printed == "".join(shown)
    # Of a real loop: how far it came, and its numbers, are the machine's.
    assert report == str(names["paced"])
