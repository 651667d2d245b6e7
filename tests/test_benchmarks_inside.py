"""What looking inside costs: the command runs, and all parts and edges are counted."""

import pytest

from benchmarks import inside
from rlhf.errors import UserError
from rlhf.models.tiny import tiny_model


def test_all_parts_and_all_edges_are_timed(tmp_path, capsys, monkeypatch):
    model = tiny_model(259)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path), "--pairs", "3", "--tokens", "6", "--batch", "2"])
    inside.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    config = model.config
    parts = config.num_hidden_layers * (config.num_attention_heads + config.intermediate_size)
    assert [row[0].strip("| ") for row in rows[-2:]] == [
        "heads and neurons, RelP",
        "edges, EAP-IG of 5 steps",
    ]
    assert rows[-2][1] == f"{parts:,}"
    assert int(rows[-1][1].replace(",", "")) > 0


def test_pairs_differ_in_a_fourth_of_their_tokens():
    first, second = inside.pairs_of(50_000, 40, 64)
    assert float((first.ids_BT != second.ids_BT).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_no_pairs_are_refused(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "nowhere", "--pairs", "0"])
    with pytest.raises(UserError, match="--pairs and --batch are at least 1"):
        inside.main()
