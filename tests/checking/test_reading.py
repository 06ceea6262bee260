"""Every kind of file gives its texts and pictures, with lines, and none leads out of the folder."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import sys
import tarfile
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clseave_cli.core.config import CheckConfig
from clseave_cli.core.prediction.checking.reading import read_texts
from clseave_cli.errors import UsageError
from clseave_cli.progress import SILENT

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz_check


def read(*paths, **options):
    return list(read_texts([Path(p) for p in paths], CheckConfig(**options), False, SILENT))


def seen(*paths, **options):
    """(place, text, the file of the picture or why there is none) of everything read."""
    return [
        (t.place, t.text, getattr(t.picture.source, "name", None) or t.picture.skipped)
        for t in read(*paths, **options)
    ]


def page(site, *lines, name="page.html"):
    (site / name).write_text("\n".join(lines), encoding="utf-8")
    return site / name


def test_html_gives_the_line_a_tag_begins_in(site):
    long = "<!-- x -->\n" * 70_000
    page(
        site,
        '<p>é <IMG src="red.png" alt="A &quot;red&quot;',
        '  picture"><img',
        " alt='second'",
        " src=blue.png>",
        f"{long}<div><img src=red.png alt=far>",
        "<script>'<img src=red.png alt=script>'</script><!-- <img src=red.png alt=comment> -->",
    )
    assert seen("page.html") == [
        (1, 'A "red" picture', "red.png"),
        (2, "second", "blue.png"),
        (70_005, "far", "red.png"),
    ]


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<img src=red.png>", [("", "red.png")]),
        ("<img src=red.png alt=''>", [("", "decorative")]),
        ("<img src=red.png alt=x role=presentation>", [("x", "decorative")]),
        ("<img srcset='a,b.png 1x, blue.png 2x' alt=x>", [("x", "blue.png")]),
        ("<picture><source srcset=blue.png><img alt=x></picture><img alt=y>",
         [("x", "blue.png"), ("y", "no source")]),
        ("<img src=data:image/gif;base64,R0lG data-src=red.png alt=lazy>", [("lazy", "red.png")]),
        ("<figure><img src=red.png><figcaption>A <b>red</b>\none</figcaption></figure>",
         [("A red one", "red.png")]),
        ("<figure><img src=red.png alt=a><figcaption>b<script>c</script></figcaption></figure>",
         [("a", "red.png"), ("b", "red.png")]),
        ("<figure><img src=red.png alt=a><img src=blue.png><figcaption>both</figcaption>",
         [("a", "red.png"), ("", "blue.png")]),
        ("<base href=https://example.org/><img src=red.png alt=x>", [("x", "remote")]),
        ("<img src=/red.png?v=1#x alt=x>", [("x", "red.png")]),
        ("<img src='%72ed.png' alt=x>", [("x", "red.png")]),
    ],
)  # fmt: skip
def test_html_pictures(site, html, expected):
    page(site, html)
    assert [(text, picture) for _, text, picture in seen("page.html")] == expected


def test_a_page_declares_encoding_and_language(site):
    source = '<html lang="ja"><meta charset=shift_jis><img src=red.png alt=赤い円>'
    (site / "page.html").write_bytes(source.encode("shift_jis"))
    (text,) = read("page.html")
    assert (text.text, text.lang) == ("赤い円", "ja")


def test_a_data_uri_is_the_picture(site):
    content = (site / "red.png").read_bytes()
    encoded = base64.b64encode(content).decode()
    page(site, f"<img src='data:image/png;base64,{encoded}' alt=x>")
    assert read("page.html")[0].picture.read() == content


def test_markdown_gives_lines_of_images_and_of_html(site):
    source = """\
        # Title

        Some text
        ![a *red*
        picture](red.png 'title') and ![](<blue.png>)

        | a |
        |---|
        | ![cell](red.png) |

        > text <img src=blue.png
        > alt=inline>

        <p>
        <img src=red.png alt=block></p>

        ```
        ![code](red.png)
        ```
        """
    page(site, textwrap.dedent(source), name="page.md")
    assert seen("page.md") == [
        (4, "a red picture", "red.png"),
        (5, "", "blue.png"),
        (9, "cell", "red.png"),
        (11, "inline", "blue.png"),
        (15, "block", "red.png"),
    ]


def test_tables(site):
    (site / "a.csv").write_text('﻿id;Image;text\n1;red.png;"two\nlines"\n2;blue.png;x\n3\n')
    (site / "b.tsv").write_text("photo\tcaption\nred.png\t\n")
    (site / "c.jsonl").write_text(
        '{"image": "red.png", "text": "x"}\n\n[1]\n{"image": null, "text": "\\ud83d"}\n'
    )
    pictures = [{"bytes": b"GIF", "path": None}, {"bytes": None, "path": "red.png"}]
    pq.write_table(pa.table({"picture": pictures, "text": ["x", "y"]}), site / "d.parquet")
    assert seen("a.csv") == [(2, "two lines", "red.png"), (4, "x", "blue.png"), (5, "", "unread")]
    assert seen("b.tsv") == [(2, "", "red.png")]
    assert seen("c.jsonl") == [(1, "x", "red.png"), (3, "", "unread"), (4, "?", "missing")]
    assert seen("d.parquet") == [("row 1", "x", ""), ("row 2", "y", "red.png")]
    assert seen("a.csv", text_column="ID", image_column="text")[1] == (4, "2", "missing")
    problem = read("a.csv", image_column="width")[0].problem
    assert "--image-column width: choose a column; there are: id, Image, text." in problem
    (site / "e.csv").write_bytes("image,text\nred.png,x\n".encode("utf-16"))
    assert read("e.csv")[0].problem == "not UTF-8; convert the file."


def test_coco_captions_and_pictures_elsewhere(site):
    (site / "images").mkdir()
    (site / "red.png").rename(site / "images" / "red.png")
    captions = [{"image_id": 7, "caption": "x"}, {"image_id": 8, "caption": "y"}, 3]
    document = {"images": [{"id": 7, "file_name": "red.png"}], "annotations": captions}
    (site / "captions.json").write_text(json.dumps(document))
    assert seen("captions.json", images=site / "images") == [
        ("annotations[0]", "x", "red.png"),
        ("annotations[1]", "y", "missing"),
        ("annotations[2]", "", "unread"),
    ]


def test_webdataset_members_are_read_where_they_are(site):
    with tarfile.open(site / "shard.tar", "w") as archive:
        for name, content in (
            ("./0.png", b"PNG"), ("./0.txt", b"zero"), ("1.jpg", b"JPG"),
            ("1.json", b'{"caption": "one"}'), ("../../2.txt", b"no picture"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    before = set(site.parent.rglob("*"))
    texts = read("shard.tar")
    entries = [(t.place, t.text, t.picture.source) for t in texts]
    assert entries == [("0", "zero", b"PNG"), ("1", "one", b"JPG")]
    assert set(site.parent.rglob("*")) == before


def test_a_folder_gives_what_is_in_it_and_nothing_else(site):
    page(site, "<img src=red.png alt=page>")
    (site / "red.txt").write_text("beside\n\ntwo\n")
    (site / "notes.txt").write_text("no picture beside it")
    (site / "other.csv").write_text("a,b\n1,2\n")
    (site / "package.json").write_text("{}")
    for hidden in (".git", "node_modules"):
        (site / hidden).mkdir()
        (site / hidden / "page.html").write_text("<img>")
    (site / "out.html").symlink_to(site.parent / "secret.html")
    (site.parent / "secret.html").write_text("<img alt=secret>")
    expected = [(1, "page", "red.png"), (1, "beside", "red.png"), (3, "two", "red.png")]
    assert seen(".") == expected


@pytest.mark.parametrize(
    ("reason", "references"),
    [
        ("outside the folder",
         ["../secret-red.png", "..%2fsecret-red.png", "..\\secret-red.png", "link.png",
          "a/../../secret-red.png", "/../secret-red.png", "file:///etc/passwd",
          "C:\\Windows\\win.ini", "linked/secret-red.png"]),
        ("remote", ["http://example.org/a.png", "//example.org/a.png"]),
        ("missing", ["pipe.png", ".", "a\0b", "x" * 5000]),
        ("not a valid URL", ["http://["]),
    ],
)  # fmt: skip
def test_no_reference_leads_out_of_the_folder(site, reason, references):
    (site / "link.png").symlink_to(site.parent / "secret-red.png")
    (site / "linked").symlink_to(site.parent)
    os.mkfifo(site / "pipe.png")
    page(site, *(f"<img alt=x src='{name}'>".replace("\0", "%00") for name in references))
    assert [entry[2] for entry in seen("page.html")] == [reason] * len(references)
    _write_rows(site, references)
    reasons = {"outside the folder", "remote", "missing", "not a valid URL"}
    entries = seen("rows.jsonl")
    assert len(entries) == len(references) and {entry[2] for entry in entries} <= reasons


def _write_rows(site, images):
    rows = [{"image": str(image), "text": "x"} for image in images]
    (site / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_an_absolute_path_in_a_table_must_be_inside(site):
    _write_rows(site, (site / "red.png", site.parent / "secret-red.png", "/etc/passwd"))
    pictures = [entry[2] for entry in seen("rows.jsonl")]
    assert pictures == ["red.png", "outside the folder", "outside the folder"]


def test_root_widens_the_folder_of_a_file(site):
    (site / "docs").mkdir()
    (site / "docs" / "page.html").write_text("<img src=../red.png alt=x><img src=/red.png alt=x>")
    assert [p for _, _, p in seen("docs/page.html")] == ["outside the folder", "missing"]
    assert [p for _, _, p in seen("docs/page.html", root=site)] == ["red.png", "red.png"]


@pytest.mark.parametrize("path", ["nothing", "red.png"])
def test_what_is_not_checked_is_refused(site, path):
    with pytest.raises(UsageError, match=path):
        read(path)


@pytest.mark.parametrize("kind", ["html", "md", "csv", "jsonl", "tar"])
def test_whatever_is_in_a_file_it_is_read_or_reported(site, kind):
    """A few files of each kind; tests/benchmarks/fuzz_check.py tries thousands."""
    randomness = random.Random(0)
    make = fuzz_check.tar if kind == "tar" else fuzz_check.source
    for _ in range(15):
        (site / f"page.{kind}").write_bytes(make(randomness))
        assert fuzz_check.attempt(site / f"page.{kind}") == ""
