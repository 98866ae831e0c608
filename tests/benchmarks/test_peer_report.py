"""What `benchmarks/peers.py` keeps and writes: parts are measured once, and only with their likes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.contestants import read_line
from benchmarks.interleaved import LostError, Part, Ratio, Rounds, interleave
from benchmarks.peer_report import Report, read_report

FACTS = {"CPU": "made up", "model": "tiny", "tpserve": "0.1.0, commit abc", "rounds": "3"}


def measure() -> Iterator[Part]:
    samples = {"tpserve": [20.0, 22.0, 21.0], "other": [10.0, 10.0, 10.5]}
    for title in ("one", "two"):
        ratios = [Ratio("tpserve", "other"), Ratio("tpserve", "absent")]
        yield Part(title, "tokens/s", Rounds(samples, 0.1), ratios)


def never() -> Iterator[Part]:
    raise AssertionError("measured again")
    yield


def test_parts_that_are_there_are_not_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    report = read_report(file, FACTS)
    first = list(report.parts_of("decode", measure))
    assert first[0].medians == {"tpserve": 21.0, "other": 10.0}
    report.save(file)
    again = read_report(file, FACTS | {"load before (1, 5, 15 minutes)": "9"})
    kept = list(again.parts_of("decode", never))
    assert [part.markdown for part in kept] == [part.markdown for part in first]
    assert kept[0].samples["samples"] == first[0].samples["samples"]
    assert again.facts == FACTS


def test_a_part_that_was_not_finished_is_not_kept(tmp_path: Path) -> None:
    report = Report(FACTS)
    next(report.parts_of("decode", measure))
    assert report.parts == {}


def test_another_commit_or_model_does_not_go_on(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    Report(FACTS).save(file)
    with pytest.raises(SystemExit, match="measured with model 'tiny'"):
        read_report(file, FACTS | {"model": "large"})


def test_the_report_has_every_table_and_a_picture(tmp_path: Path) -> None:
    report = Report(FACTS)
    list(report.parts_of("decode", measure))
    report.write(tmp_path / "peers.md")
    text = (tmp_path / "peers.md").read_text()
    assert "- CPU: made up" in text
    assert "| tpserve | 21 | 20 to 22 |" in text
    assert "| tpserve | other | 2.10 | 2.00 to 2.20 |" in text
    assert "absent" not in text
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_ends_by_itself_is_left_out_and_the_others_go_on() -> None:
    answers = iter((1.0, 2.0))

    def crash() -> float:
        found = next(answers, None)
        if found is None:
            raise LostError("peer.py ended with exit code -11")
        return found

    rounds = interleave({"tpserve": lambda: 3.0, "other": crash}, 3)
    assert rounds.samples == {"tpserve": [3.0] * 3}
    part = Part("one", "tokens/s", rounds, [Ratio("tpserve", "other")])
    assert "other is left out: peer.py ended with exit code -11." in part.as_markdown()
    assert part.as_json()["lost"] == {"other": "peer.py ended with exit code -11"}


def test_what_cannot_go_on_without_a_peer_ends_with_what_is_known_of_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "raise SystemExit(3)", "peer.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, pytest.raises(LostError, match=r"^peer\.py ended with exit code 3$"):
        read_line(process)
