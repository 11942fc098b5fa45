from __future__ import annotations

import csv
import io
import json
import math
import random
from dataclasses import replace

import pytest

from meiqa.cli.eval import evaluation_text
from meiqa.errors import DecodeError
from meiqa.formats import (
    CSV_COLUMNS,
    ResultWriter,
    comparison_phrase,
    json_text,
    reasons_for,
    reasons_phrase,
    total_ms,
    write_comparison,
)
from meiqa.types import Assessment, Detail, Failure, Neighbour, PairComparison

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
            Neighbour("as expected", "anchor", 3.1, 0.1, 0.55),
            Neighbour("not asked", "anchor", 1.0, 0.1, None),
            Neighbour("upset", "contrast", 4.5, 0.1, 0.9),
            Neighbour("mild", "anchor", 3.1, 0.1, 0.7),
        ),
        timings_ms={"vision": 10.0, "decode": 5.0},
    )


def written(format: str, *results: Assessment | Failure) -> str:
    stream = io.StringIO()
    with ResultWriter(format, stream) as writer:  # type: ignore[arg-type]
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
        with ResultWriter("json", stream) as writer:
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
    assert "beats as expected (3.10) 55 % (3 compared)" in text
    assert "on reflection: Warmer." in text
    assert "note: one order; not remembered" in text
    assert "b.jpg" not in text


def test_every_format_rounds_alike(assessment: Assessment) -> None:
    long = replace(
        assessment,
        score=3.456789012345,
        percentile=61.23456,
        neighbours=(Neighbour("a", "anchor", 2.345678901, 0.1, 0.123456789),),
        grades={"good": 0.123456789},
        timings_ms={"total": 12.3456789},
    )
    (row,) = csv.DictReader(io.StringIO(written("csv", long)))
    (values,) = json.loads(written("json", long))
    assert (row["score"], row["percentile"], row["total_ms"]) == ("3.4568", "61.2", "12.3")
    assert (values["score"], values["percentile"]) == (3.4568, 61.2)
    assert values["timings_ms"] == {"total": 12.3}
    assert values["neighbours"][0] == {
        **{"id": "a", "origin": "anchor"},
        **{"score": 2.3457, "preference": 0.1235, "device": None},
    }
    assert values["grades"] == {"good": 0.1235}
    assert json.loads(written("jsonl", long)) == values


def test_detail_is_one_line_and_is_rounded(assessment: Assessment) -> None:
    seen = replace(assessment, detail=Detail(0.41237, 1.2345, 0.4567, (128, 256, 256, 256)))
    line = "at 100 %: edges 2.4 px wide, motion 1.2 px, noise 0.5   (sharpest at 128, 256)"
    assert f"\n  {line}\n" in written("text", seen)
    assert "at 100 %" not in written("text", assessment)
    assert json.loads(written("json", seen))[0]["detail"] == {
        "sharpness": 0.4124,
        "motion": 1.23,
        "noise": 0.46,
        "place": [128, 256, 256, 256],
        "jpeg": None,
    }


def test_text_without_anchors_claims_no_percentile(assessment: Assessment) -> None:
    text = written("text", replace(assessment, percentile=math.nan, neighbours=(), summary=None))
    assert "nan" not in text
    assert len(text.splitlines()) == 2


def neighbour(score: float, preference: float | None) -> Neighbour:
    return Neighbour(f"{score}", "anchor", score, 0.1, preference)


def chosen(score: float, *neighbours: Neighbour) -> tuple[bool, list[float]]:
    reasons, agree = reasons_for(score, neighbours)
    return agree, [each.score for each in reasons]


def test_reasons_are_the_closest_on_either_side_that_agree() -> None:
    around = [neighbour(2.0, 0.9), neighbour(2.9, 0.8), neighbour(3.2, 0.3), neighbour(4.5, 0.1)]
    assert chosen(3.0, *around) == (True, [2.9, 3.2])
    upset = neighbour(3.1, 0.9)  # it was beaten, though it scores higher
    assert chosen(3.0, upset, *around) == (True, [2.9, 3.2])
    assert chosen(3.0, neighbour(3.1, None), *around) == (True, [2.9, 3.2])
    assert chosen(3.0) == (True, [])


def test_a_photo_out_of_its_neighbours_line_is_told_so(assessment: Assessment) -> None:
    against = (neighbour(2.9, 0.2), neighbour(2.8, 0.1), neighbour(3.9, 0.7), neighbour(4.5, 0.1))
    assert chosen(3.456, *against) == (False, [2.9, 3.9])
    told = reasons_phrase(replace(assessment, neighbours=against))
    assert told == "its neighbours say otherwise: loses to 2.9 (2.90) 80 %, beats 3.9 (3.90) 70 %"
    assert reasons_phrase(replace(assessment, neighbours=())) == ""


@pytest.mark.parametrize("seed", range(20))
def test_reasons_never_contradict_the_score_unsaid(seed: int) -> None:
    chance = random.Random(seed)
    score = chance.uniform(1, 5)
    neighbours = [
        neighbour(chance.uniform(1, 5), chance.random()) for _ in range(chance.randrange(9))
    ]
    reasons, agree = reasons_for(score, neighbours)
    for each in reasons:
        assert each.preference is not None
        assert ((each.preference > 0.5) == (score > each.score)) is agree


def test_a_defeat_is_told_from_the_winners_side() -> None:
    assert comparison_phrase(Neighbour("x", "anchor", 2, 0.1, 0.2)) == "loses to x (2.00) 80 %"


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
        assert next(csv.DictReader(io.StringIO(text)))["preference"] == "0.2000"
    else:
        assert json.loads(text) == comparison.to_dict()


@pytest.mark.parametrize(
    ("preference", "scores", "told"),
    [
        (0.994, (4.5, 1.5), "a looks better than b with probability 0.99\n"),
        (0.004, (1.5, 4.5), "b looks better than a with probability over 0.99\n"),
        (0.5, (3.0, 3.0), "no difference between a and b\n"),
        (0.5, (3.0, 2.0), "a looks better than b with probability 0.50\n"),
    ],
)
def test_a_comparison_is_neither_certain_nor_a_coin(
    preference: float, scores: tuple[float, float], told: str
) -> None:
    stream = io.StringIO()
    write_comparison(PairComparison("a", "b", preference, *scores), "text", stream)
    assert stream.getvalue().startswith(told)


def test_evaluation_table() -> None:
    figures = dict.fromkeys(
        ("srcc", "plcc", "krcc", "rmse", "js", "effective_bins", "distinct", "tie_rate"), 0.5
    )
    figures |= {"srcc_ci95": [0.4, 0.6]}
    report = {
        "n": 7,
        "k": 8,
        "mos_range": [0.0, 1.0],
        "initial": figures,
        "fused": {**figures, "srcc": 0.625},
        "tied_pairs": {"pairs": 12, "agreement": 0.75},
        "coverage95": 0.9,
        "reliability": [{"nominal": 0.5, "observed": 0.47}],
        "deviation": {"srcc": 0.35, "coverage95": [0.96, 0.95, 0.94, 0.93]},
        "seconds_per_image": 0.25,
        "failures": [],
    }
    text = evaluation_text(report)
    assert text.startswith("7 photos, K = 8, human scores 0 to 1 mapped to 1-5\n")
    assert "0.6250" in text
    assert "90.0 % of the human scores" in text
    assert "within other intervals: 47.0 % in 50 %" in text
    assert "SRCC of 0.350; from the surest quarter to the least sure, 96.0, 95.0, 94.0" in text
    assert (
        "of 12 pairs that people tell apart and the initial score does not, the fused score "
        in text
    )
    assert "orders 75.0 % as people do" in text
    report["tied_pairs"] = {"pairs": 0, "agreement": float("nan")}
    assert "no two photos that people tell apart have the same initial score" in evaluation_text(
        report
    )
