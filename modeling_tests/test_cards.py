"""A card says what is true, and the snippet in it runs."""

import re

import pytest
import yaml

from transformers_unicode2.cards import name_places, write_card, write_table


def test_a_card_has_metadata_tables_and_settings(tmp_path):
    figures = [{"data": "held out", "image gap": 6.25, "rows": 1200}]
    write_card(
        tmp_path,
        "org/own",
        "Made here.",
        ["org/base", str(tmp_path)],
        {"Figures": figures, "Nothing": []},
        {"learning_rate": 1e-3},
    )
    text = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert data["base_model"] == ["org/base"] and data["library_name"] == "transformers" and "license" not in data
    assert "| held out | 6.25 | 1,200 |" in text and '"learning_rate": 0.001' in text and "Nothing" not in text
    assert "| torch |" in text


def test_a_card_names_no_place_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = str(tmp_path / "runs" / "base")
    settings = {
        "model": base,
        "datasets": [{"path": "runs/base"}, {"path": "org/data"}],
        "start": tmp_path / "gone.yaml",
    }
    write_card(tmp_path, "runs/own", f"Of `{base}` and `org/llm`.", [base], {"Parts": [{"of": base, "n": 2}]}, settings)
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in text and "runs/" not in text
    assert "# own\n" in text and 'model="own"' in text and "Of `base` and `org/llm`." in text and "| base | 2 |" in text
    assert '"model": "base"' in text and '"path": "org/data"' in text and '"start": "gone.yaml"' in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/no_think {question}", "/no_think {question}"),
        ("/no_think", "/no_think"),
        ("/gone/unicode2-tiny", "unicode2-tiny"),
        ("/tmp/my photos", "my photos"),
        ("org/llm", "org/llm"),
        ("/", ""),
    ],
)
def test_what_begins_with_a_slash_is_not_always_a_path(text, shown):
    assert name_places(text) == shown


def test_a_cell_is_one_line_and_no_html():
    table = write_table([{"a": "x\ny <b> | `<|image|>`", "b": 1}])
    assert table.splitlines()[2] == "| x<br>y &lt;b&gt; \\| `<\\|image\\|>` | 1 |"


def test_the_snippet_of_a_card_runs(tiny_checkpoint, photo, tmp_path, monkeypatch, capsys):
    """Beside the folder that it is about."""
    monkeypatch.chdir(tmp_path)
    photo.save("picture.png")
    (tmp_path / tiny_checkpoint.name).symlink_to(tiny_checkpoint)
    write_card(tmp_path, str(tiny_checkpoint), "Tiny.", [])
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[1], {})
    assert capsys.readouterr().out.strip()
    write_card(tmp_path, str(tiny_checkpoint), "Tiny.", [], kind="adapter")
    exec(re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[1], {})
    assert capsys.readouterr().out.strip()
