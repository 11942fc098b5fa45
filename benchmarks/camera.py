"""Does a camera's verdict see what changed: a scene that turns sharp, blurred, dark and bright.

    python -m benchmarks.camera --data DATA [--photographs 24]

Of each unseen photograph a video is made and encoded: a hand holds the camera, the sensor adds
noise, and every two seconds the scene changes, sharply or softly, darkly or brightly. Then comes
the next photograph. The frames go the whole way of `meiqa camera`, on a clock of the video's. Of
each change: does the trend of the first second go the right way, and nowhere else; does it say why;
is the best frame of the last 5 s a sound one, and is the frame called the best only where it is?
Of each photograph: is it taken for a new scene, and for one scene? The same is asked of the
difference of two scores. And how far is the score of a photograph that is looked at with fewer of
its pixels, as `--fps` does where time is short, and what share of the time does that take?
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from meiqa.engine.engine import Engine
from meiqa.evaluation.measuring import run_on
from meiqa.evaluation.scenes import in_bytes, lit
from meiqa.progress import Progress
from meiqa.serve.camera import BEST_S, SHARES, CameraSession, Watcher, shrunk
from meiqa.serve.guidance import Change
from training.data import pristine_names, read_pixels

Bytes = NDArray[np.uint8]

RATE_HZ, STATE_S = 5.0, 2.0
HAND = 0.02
"""By how much of its side the view moves, at the most."""
NOISE = 2.0
"""Deviation of the sensor's noise, in grey levels."""
BLUR, LIGHT = (1.5, 4.0), (0.03, 0.12)
"""Radii in pixels, and shares of the light, of which each photograph gets one."""
SOUND = "sharp and bright"
STATES = (
    *(SOUND, "blurred", "blurred and dark", SOUND),
    *("dark", SOUND, "blurred", SOUND),
)
CHANGES = {
    (SOUND, "blurred"): ("worse", {"Softer"}),
    ("blurred", "blurred and dark"): ("worse", {"Darker"}),
    ("blurred and dark", SOUND): ("better", {"Sharper", "Brighter"}),
    (SOUND, "dark"): ("worse", {"Darker"}),
    ("dark", SOUND): ("better", {"Brighter"}),
    ("blurred", SOUND): ("better", {"Sharper"}),
}
"""Which way each change goes, and in what."""
HOLD = "Hold"
"""How the verdict on a frame begins that is better than others of late, and the best."""
SCORES_DIFFER = 0.24
"""Difference of two scores that is told, as large as that which a comparison tells."""


@dataclass(frozen=True)
class Watched:
    """One look at a video: what is there, what was said, and which state the best frame is of."""

    photo: int
    state: str
    at_s: float
    score: float
    change: Change | None
    best_state: str


def frames_of(photo: Bytes, seed: int, states: Sequence[str] = STATES) -> Iterator[Bytes]:
    """Give the frames of a scene (H, W, 3) that goes through its states, both sides even."""
    rng = np.random.default_rng(seed)
    image, phase = Image.fromarray(photo), rng.uniform(0, 2 * np.pi, 2)
    blur, light = rng.uniform(*BLUR), np.exp(rng.uniform(*np.log(LIGHT)))
    size = np.array(image.size) // 2 * 2
    for number in range(round(len(states) * STATE_S * RATE_HZ)):
        state = states[int(number / RATE_HZ / STATE_S)]
        moved = HAND * np.sin(phase + number / RATE_HZ * np.array([2.1, 3.2]))
        corner = size * (HAND + moved)
        box = (*corner, *(corner + size * (1.0 - 2.0 * HAND)))
        shot = image.resize(tuple(size), Image.Resampling.BICUBIC, box=box)
        if "blurred" in state:
            shot = shot.filter(ImageFilter.GaussianBlur(blur))
        pixels = np.asarray(shot)
        if "dark" in state:
            pixels = lit(light)(pixels, rng)
        yield in_bytes(pixels + rng.normal(0.0, NOISE, pixels.shape))


def filmed(frames: Iterable[Bytes], path: Path) -> Iterator[Bytes]:
    """Encode frames as a camera does, and give them as they are decoded."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=round(RATE_HZ), options={"crf": "20"})
        stream.pix_fmt = "yuv420p"
        for number, pixels in enumerate(frames):
            if not number:
                stream.height, stream.width = pixels.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def watched(engine: Engine, photos: Iterable[Bytes], folder: Path) -> Iterator[Watched]:
    """Let a camera see one photograph after the other, in all states."""
    now_s = 0.0
    states: dict[float, str] = {}
    neighbours = engine.model.calibration.neighbours
    session = CameraSession(RATE_HZ, neighbours=neighbours)
    watcher = Watcher(engine, session, 2000.0, clock=lambda: now_s)
    for number, photo in enumerate(photos):
        film = filmed(frames_of(photo, number), folder / f"{number}.mp4")
        for place, pixels in enumerate(film):
            states[now_s] = state = STATES[int(place / RATE_HZ / STATE_S)]
            judged = watcher.judge(pixels)
            best = session.scenes.best(BEST_S, now_s)
            best_state = "" if best is None else states[best.at_s]
            score = judged.found.score
            yield Watched(number, state, now_s, score, judged.change, best_state)
            now_s += 1.0 / RATE_HZ


def went(codes: Iterable[str], way: str) -> bool:
    """Tell whether a trend went one way, and no other."""
    return {code for code in codes if code != "steady"} == {way}


def judged_change(before: Sequence[Watched], after: Sequence[Watched]) -> dict[str, Any]:
    """Tell what was right of a change, from the looks of the state before and of that after."""
    names = before[-1].state, after[0].state
    way, words = CHANGES[names]
    first = [each for each in after if each.at_s - after[0].at_s < 1.0 - 1e-9]
    changes = [each.change for each in first if each.change is not None]
    said = {each.text.split(" ")[0].rstrip(":") for each in changes if each.code == way}
    last, sound = after[-1], after[0].state == SOUND
    is_best = last.change is not None and last.change.best
    gaps = [each.score - before[-1].score for each in first]
    by_scores = ["steady" if abs(g) <= SCORES_DIFFER else ("worse", "better")[g > 0] for g in gaps]
    return {
        "change": " to ".join(names),
        "trend": went((each.code for each in changes), way),
        "words": bool(said) and said <= (words | {HOLD} if sound else words),
        "best": last.best_state == SOUND and is_best == sound,
        "by_scores": went(by_scores, way),
    }


def changes_in(looks: Iterable[Watched]) -> list[dict[str, Any]]:
    """Judge each change of each photograph."""
    parts = [
        (photo, list(part)) for (photo, _), part in groupby(looks, lambda e: (e.photo, e.state))
    ]
    return [
        judged_change(before, after)
        for (one, before), (other, after) in pairwise(parts)
        if one == other
    ]


def summary(looks: Sequence[Watched]) -> dict[str, Any]:
    """Sum up what was right."""
    found = changes_in(looks)
    firsts = {next(part).at_s for _, part in groupby(looks, lambda each: each.photo)}
    new = [each for each in looks if each.change is not None and each.change.code == "new"]
    asked = ("trend", "words", "best", "by_scores")
    return {
        "photographs": len(firsts),
        "looks": len(looks),
        "changes": len(found),
        **{f"{name}_right": round(float(np.mean([e[name] for e in found])), 4) for name in asked},
        "new_scenes_found": sum(each.at_s in firsts for each in new),
        "new_scenes_imagined": sum(each.at_s not in firsts for each in new),
        "wrong": [each for each in found if not (each["trend"] and each["words"] and each["best"])],
    }


def smaller_looks(engine: Engine, photos: Iterable[Bytes]) -> dict[str, dict[str, float]]:
    """Score photographs with fewer of their pixels; give the mean distance, and share of time."""
    most = engine.model.image.max_pixels
    found: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    for photo in photos:
        for share, each in found.items():
            scored = engine.score(shrunk(photo, share * most), k=0, learn=False, detail=False)
            each.append((scored.score, scored.timings_ms["read"]))
    whole = np.array(found[1.0])
    return {
        f"{share:g}": {
            "score_off": round(float(np.abs(np.array(each) - whole)[:, 0].mean()), 3),
            "time": round(float(np.median(np.array(each)[:, 1]) / np.median(whole[:, 1])), 3),
        }
        for share, each in found.items()
        if share < 1.0
    }


def bench_camera(data: Path, photographs: int) -> dict[str, Any]:
    """Watch videos of unseen photographs."""
    names = pristine_names(data, held_out=True)[:photographs]
    photos = [read_pixels(data / "pristine" / "images" / name) for name in names]
    total = round(len(names) * len(STATES) * STATE_S * RATE_HZ)
    looks = []
    with (
        Engine.open(learn=False) as engine,
        TemporaryDirectory() as folder,
        Progress(total) as progress,
    ):
        for look in watched(engine, photos, Path(folder)):
            looks.append(look)
            progress.advance()
        smaller = smaller_looks(engine, photos)
    return {
        **summary(looks),
        "smaller_looks": smaller,
        **run_on("onnxruntime", "numpy", "pillow", "av"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.camera")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--photographs", type=int, default=24)
    options = parser.parse_args(arguments)
    sys.stdout.write(json.dumps(bench_camera(options.data, options.photographs), indent=2) + "\n")


if __name__ == "__main__":
    main()
