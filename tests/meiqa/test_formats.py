from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import pytest

from meiqa.errors import DecodeError
from meiqa.formats import (
    CSV_COLUMNS,
    comparison_phrase,
    evaluation_text,
    json_text,
    result_writer,
    telling_comparisons,
    total_ms,
    write_comparison,
)
from meiqa.types import Assessment, Failure, Neighbour, PairComparison

FAILURE = Failure("b.jpg", DecodeError("b.jpg is empty", hint="fetch it again"))


@pytest.fixture
def assessment() -> Assessment:
    return Assessment(
        path="a.jpg",
        score=3.456,
        std=0.21,
        ci95=(3.04, 3.87),
        initial_score=3.1,
        word="good",
        percentile=61.0,
        summary='Sharp, "warm"\nlight',
        neighbours=(
            Neighbour("as expected", "anchor", 3.1, 0.1, 0.5),
            Neighbour("not asked", "anchor", 1.0, 0.1, None),
            Neighbour("upset", "contrast", 4.5, 0.1, 0.9),
            Neighbour("mild", "anchor", 3.1, 0.1, 0.7),
        ),
        timings_ms={"vision": 10.0, "decode": 5.0},
    )


def written(format: str, *results: Assessment | Failure) -> str:
    stream = io.StringIO()
    with result_writer(format, stream) as writer:  # type: ignore[arg-type]
        for result in results:
            writer.write(result)
    return stream.getvalue()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_json_is_always_an_array(assessment: Assessment, count: int) -> None:
    results = json.loads(written("json", *[assessment] * count))
    assert [result["path"] for result in results] == ["a.jpg"] * count


def test_json_array_is_complete_when_a_run_is_cut_short(assessment: Assessment) -> None:
    stream = io.StringIO()

    def cut_short() -> None:
        with result_writer("json", stream) as writer:
            writer.write(assessment)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cut_short()
    assert len(json.loads(stream.getvalue())) == 1


def test_failures_stand_among_the_json_lines(assessment: Assessment) -> None:
    lines = [json.loads(line) for line in written("jsonl", assessment, FAILURE).splitlines()]
    assert lines[0] == json.loads(json.dumps(assessment.to_dict()))
    assert lines[1] == FAILURE.to_dict()


def test_csv_can_be_read_back(assessment: Assessment) -> None:
    first, second = csv.DictReader(io.StringIO(written("csv", assessment, FAILURE)))
    assert list(first) == list(CSV_COLUMNS)
    assert first["score"] == "3.4560"
    assert first["summary"] == assessment.summary
    assert first["compared"] == "3"
    assert first["total_ms"] == "15.0"
    assert (second["path"], second["score"], second["hint"]) == ("b.jpg", "", "fetch it again")


def test_text_tells_the_whole_way(assessment: Assessment) -> None:
    text = written(
        "text",
        replace(assessment, reflection="Warmer.", degraded=("one order", "not remembered")),
        FAILURE,
    )
    assert "3.46 ± 0.21  good   (initial 3.10, better than 61 % of the anchors, 15 ms)" in text
    assert "beats upset (4.50) 90 %, beats mild (3.10) 70 % (3 compared)" in text
    assert "on reflection: Warmer." in text
    assert "note: one order; not remembered" in text
    assert "b.jpg" not in text


def test_text_without_anchors_claims_no_percentile(assessment: Assessment) -> None:
    text = written("text", replace(assessment, percentile=math.nan, neighbours=(), summary=None))
    assert "nan" not in text
    assert len(text.splitlines()) == 2


def test_telling_comparisons_are_the_least_expected(assessment: Assessment) -> None:
    assert [one.id for one in telling_comparisons(assessment)] == ["upset", "mild"]
    assert len(telling_comparisons(assessment, count=9)) == 3


def test_a_defeat_is_told_from_the_winners_side() -> None:
    assert comparison_phrase(Neighbour("x", "anchor", 2, 0.1, 0.2)) == "loses to x (2.00) 80 %"
    assert "not compared" in comparison_phrase(Neighbour("x", "anchor", 2, 0.1, None))


def test_total_prefers_the_measured_total() -> None:
    assert total_ms({"total": 7.0, "vision": 5.0}) == 7.0
    assert total_ms({}) == 0


def test_json_has_no_nan() -> None:
    assert json_text({"a": [math.nan, -math.inf, 1.5], "b": (2,)}) == (
        '{"a": [null, null, 1.5], "b": [2]}'
    )


@pytest.mark.parametrize("format", ["text", "json", "jsonl", "csv"])
def test_comparison(format: str) -> None:
    stream = io.StringIO()
    comparison = PairComparison("a.jpg", "b.jpg", 0.2, 2.5, 3.5, {"total": 9.0})
    write_comparison(comparison, format, stream)  # type: ignore[arg-type]
    text = stream.getvalue()
    if format == "text":
        assert text.startswith("b.jpg looks better than a.jpg with probability 0.80\n")
    elif format == "csv":
        assert next(csv.DictReader(io.StringIO(text)))["preference"] == "0.2"
    else:
        assert json.loads(text) == comparison.to_dict()


def test_evaluation_table() -> None:
    figures = dict.fromkeys(
        ("srcc", "plcc", "krcc", "rmse", "js", "effective_bins", "distinct", "tie_rate"), 0.5
    )
    report = {
        "n": 7,
        "k": 8,
        "mos_range": [0.0, 1.0],
        "initial": figures,
        "fused": {**figures, "srcc": 0.625},
        "tied_pairs": {"pairs": 12, "agreement": 0.75},
        "coverage95": 0.9,
        "reliability": [{"nominal": 0.5, "observed": 0.47}],
        "seconds_per_image": 0.25,
        "failures": [],
    }
    text = evaluation_text(report)
    assert text.startswith("7 photos, K = 8, human scores 0 to 1 mapped to 1-5\n")
    assert "0.6250" in text
    assert "90.0 % of the human scores" in text
    assert "within other intervals: 47.0 % in 50 %" in text
    assert (
        "of 12 pairs that people tell apart and the initial score does not, the fused score "
        in text
    )
    assert "orders 75.0 % as people do" in text
    report["tied_pairs"] = {"pairs": 0, "agreement": float("nan")}
    assert "no two photos that people tell apart have the same initial score" in evaluation_text(
        report
    )
