"""Checkpoint → verified engine package.

Everything is written into a folder beside the target and moved into place at the end, so an
interrupted or refused export leaves nothing half-written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.calibration import NEUTRAL_GRADED, UNCALIBRATED, check_score_head
from meiqa.engine.images import ImageSource, fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.manifest import PRECISIONS, ImageProcessing, Manifest
from meiqa.engine.model import Asked
from meiqa.engine.package import EnginePackage, file_digest, write_manifest
from meiqa.engine.prompts import PromptFamily, Prompts, prompt_family
from meiqa.engine.runtime.decoder import (
    LAYERS_FILE,
    GraphDecoder,
    GraphSession,
    NativeDecoder,
    layers_beside,
)
from meiqa.errors import PackageCorrupted, PackageUnwritable, UsageError
from meiqa.export.calibration import (
    BITS,
    SAMPLED_ROWS,
    WIDE,
    Pictures,
    Quantisation,
    SensitivityStudy,
    observe,
    require_pictures,
)
from meiqa.export.checkpoint import Checkpoint, digest_of, give_weights
from meiqa.export.fused import write_fused_layers
from meiqa.export.graphs import (
    TorchSession,
    decoder_interface,
    traced,
    vision_interface,
)
from meiqa.export.layers import LOCK, halve, save_graph, temporary_folder
from meiqa.export.patterns import FILE, TrainedPatterns, write_patterns
from meiqa.export.rounding import Observed
from meiqa.export.verify import (
    PIECE_BYTES,
    PiecewiseSession,
    decoder_feeds,
    grades_of,
    held_bytes,
    require_parity,
    vision_feeds,
)
from meiqa.kernels.cores import usable_cores
from meiqa.kernels.decoder import FASTEST_IN_BF16, KERNELS

RIDGE = 1e-2
CALIBRATED, STUDIED, CHECKED = slice(0, 40), slice(40, 80), slice(80, 120)
"""Which of the pictures ranges are observed on, layers' precisions chosen on, grades checked on."""
KEY_PICTURES = 256
A_DESCRIPTION = (
    "The picture shows a street at dusk, with a cyclist in front of a row of shops. The cyclist is"
    " in focus and the faces are sharp, but the lamps behind them are clipped to white, and dark"
    " parts of the road show coarse, coloured noise. Motion has softened the wheels a little. The"
    " white balance is warm, which suits the hour; contrast is strong, and some shadows hold no"
    " detail any more. Fine texture in the brick wall looks smeared, as if the camera had removed"
    " noise there, and faint blocks of compression can be seen around the signs. The composition is"
    " balanced, although the horizon tilts by 2 or 3 degrees. Overall the quality is fair: pleasant"
    " at a small size, and disappointing when it is seen at full size."
)
"""Read in place of descriptions of their own by models that take long to write one."""
OBSERVED_TOKENS = 96
"""Longest description while activations are observed; what follows looks alike."""
SYNTHETIC_PICTURES, SYNTHETIC_SIDE = 4, 256
PEAK_BYTES_A_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 6, "int4": 6}
"""Bytes of a weight on the disk when an export takes most: float graphs beside what they become."""
HELD_AT_ONCE = 3
"""Graphs, or as much of them as is held at a time, that are in memory when an export takes most."""
RUNTIME_BYTES = 1 << 30
"""What PyTorch, ONNX Runtime and activations take beside them."""
ABSOLUTE, RELATIVE = 1e-4, {"fp32": 1e-3, "fp16": 2e-2}
"""Each token of an output may differ from PyTorch by so much, or by this share of its size."""
LARGEST_MOVES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.03, "int4": 0.06}
"""Largest mean change of a grade, on the 1-5 scale, from PyTorch to the package."""


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        precision: one of `PRECISIONS`.
        prompt: what the model is asked; by default what suits the checkpoint's family.
        pictures: photographs to calibrate and verify on; int8 needs them.
        max_pixels: bound of the area that the vision tower sees; the checkpoint's by default.
        sensitivity: measure which layers bear few bits; otherwise only the one that sees pixels and
            the one that makes logits stay in fp16. Takes minutes with a small model.
        key_pictures: how many of the pictures are described, to fit the key of photos about which
            nothing is written; 0 leaves that out. By default 256, or 0 where the decoder's weights
            exceed `PIECE_BYTES`, since writing with a large model takes hours on a CPU.
        score_head: what makes the first score unless another is asked for: "text", "levels" or
            "grm", which is neutral until it is fitted.
        largest_move: mean change of a grade from PyTorch's that is accepted, on the 1-5 scale, and
            that precisions are chosen for where it is less than that of `LARGEST_MOVES`, the
            default.
        say: told of each step; show: how much of one is done (0-1), where one takes long.
    """

    precision: str = "int8"
    prompt: PromptFamily | None = None
    pictures: Sequence[ImageSource] = ()
    max_pixels: int | None = None
    sensitivity: bool = True
    key_pictures: int | None = None
    score_head: str = "text"
    largest_move: float | None = None
    say: Callable[[str], None] = lambda step: None
    show: Callable[[str, float], None] = lambda step, share: None

    def __post_init__(self) -> None:
        check_score_head(self.score_head)
        if self.precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise UsageError("unknown precision", seen=self.precision, allowed=allowed)
        require_pictures(self.precision, self.pictures)


def export_package(source: Path, out: Path, options: ExportOptions) -> EnginePackage:
    """Export a checkpoint.

    Args:
        source: folder in Hugging Face's layout.

    Raises:
        UsageError: something is at `out`.
        PackageNotFound, PackageCorrupted: the checkpoint is incomplete or damaged, its architecture
            is not supported, or what was exported differs from PyTorch by more than the tolerance.
        PackageUnwritable: the disk is full or refuses to be written.
    """
    if out.exists():
        raise UsageError(f"{out} is there already", hint="remove it or choose another name")
    checkpoint = Checkpoint.open(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out.parent, f".{out.name}.partial-") as folder:
            options.say(require_room(checkpoint, folder, options))
            Export(checkpoint, folder, options).write()
            (folder / LOCK).unlink()
            folder.chmod(0o755)
            folder.replace(out)
    except OSError as error:
        raise PackageUnwritable(
            f"{out} can't be written",
            seen=error.strerror or str(error),
            hint="see `df` and `ls -ld`",
        ) from error
    return EnginePackage.open(out)


def require_room(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> str:
    """Refuse at once what would fill the disk after minutes; one line of what will be needed."""
    sizes = [tensor.numel() for tensor in checkpoint.weights.headers().values()]
    # The largest tensor, the embedding, is written as a file and, where it is tied, as a head.
    needed = (sum(sizes) + max(sizes)) * PEAK_BYTES_A_WEIGHT[options.precision]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PackageUnwritable(
            f"there is too little space in {folder.parent}",
            seen=f"{free / 2**30:.1f} GiB",
            allowed=f"{needed / 2**30:.1f} GiB or more",
            hint="choose another place for --out",
        )
    held = HELD_AT_ONCE * min(held_bytes(), 4 * sum(sizes)) + RUNTIME_BYTES
    if options.pictures:
        held += sampled_bytes(checkpoint, options.precision)
    return (
        f"{sum(sizes) / 1e9:.2g} billion weights: up to {held / 2**30:.0f} GiB of memory, and"
        f" {needed / 2**30:.1f} GiB on the disk until it is done"
    )


def sampled_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Bytes that samples of what linear layers read take at most, as if none read the same."""
    shapes = (tensor.shape for tensor in checkpoint.weights.headers().values())
    channels = sum(min(shape[1], WIDE) for shape in shapes if len(shape) == 2)
    return 4 * SAMPLED_ROWS.get(precision, 0) * channels


class Export:
    """One export, on its way into a folder."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> None:
        self.checkpoint, self.folder, self.options = checkpoint, folder, options
        self.shape = checkpoint.text.shape
        self.image = narrowed(checkpoint.image, options.max_pixels)
        self.graphs = {
            "vision": vision_interface(self.image, self.shape),
            "decoder": decoder_interface(self.shape),
        }
        self.prompt = options.prompt or prompt_family(checkpoint.family.prompt)
        self.ends = tuple(end for end in checkpoint.ends if end != self.prompt.stop)
        # Refuses answers that are not single tokens.
        Prompts(self.prompt, checkpoint.tokenizer, self.ends)
        source = checkpoint.folder
        self.source = {"name": source.resolve().name, "sha256": digest_of(source)}
        self.report: dict[str, Any] = {}
        self.bf16 = False
        wanted = options.largest_move
        self.largest_move = LARGEST_MOVES[options.precision] if wanted is None else wanted
        self.pictures = [fit_to_grid(load_pixels(p), self.image) for p in options.pictures]

    def write(self) -> None:
        reference = self.reference_sessions()
        self.write_graphs()
        self.check_graphs(reference)
        self.write_data()
        self.seal()
        self.quantise()
        made = write_fused_layers(self.folder, self.checkpoint.text, self.options.precision)
        self.report["parity"] |= {LAYERS_FILE: made} if made else {}
        self.check_grades(reference)
        self.fit_key_projection()
        self.seal()
        self.add_patterns()

    def reference_sessions(self) -> Mapping[str, GraphSession]:
        """Open the checkpoint itself in PyTorch, its weights read when they are needed."""
        tower, decoder = self.checkpoint.tower(), self.checkpoint.decoder()
        give_weights(tower, self.checkpoint.tower_weight, PIECE_BYTES)
        give_weights(decoder, self.checkpoint.decoder_weight, PIECE_BYTES)
        return {
            "vision": TorchSession(tower, self.graphs["vision"]),
            "decoder": TorchSession(decoder, self.graphs["decoder"]),
        }

    def write_graphs(self) -> None:
        """Trace both graphs and write them, in half precision or in single."""
        model = self.checkpoint
        for name, said, module, weight in (
            ("vision", "vision tower", model.tower(), model.tower_weight),
            ("decoder", "decoder", model.decoder(), model.decoder_weight),
        ):
            self.options.say(f"tracing the {said}")
            graph = traced(module, self.graphs[name], weight)
            if self.options.precision == "fp16":
                halve(graph)
            save_graph(graph, self.folder / f"{name}.onnx")

    def check_graphs(self, reference: Mapping[str, GraphSession]) -> None:
        """Compare each graph with PyTorch on shapes that tracing has not seen."""
        feeds = {"vision": vision_feeds(self.image), "decoder": decoder_feeds(self.shape)}
        self.report["parity"] = {}
        for name, session in reference.items():
            self.options.say(f"comparing the {name} graph with PyTorch")
            self.report["parity"][name] = require_parity(
                name,
                session,
                PiecewiseSession(self.folder / f"{name}.onnx"),
                feeds[name],
                absolute=ABSOLUTE,
                relative=RELATIVE["fp16" if self.options.precision == "fp16" else "fp32"],
            )

    def write_data(self) -> None:
        """Write embeddings, tokenizer and a projection that is still to be fitted."""
        embedding = self.checkpoint.decoder_weight("embed_tokens.weight")
        exact = self.options.precision == "fp32"
        np.save(self.folder / "embedding.npy", (embedding if exact else embedding.half()).numpy())
        self.checkpoint.tokenizer.save(str(self.folder / "tokenizer.json"))
        widths = self.shape.embed_width + 1, self.shape.hidden_size
        np.save(self.folder / "key_projection.npy", np.zeros(widths, np.float32))

    def quantise(self) -> None:
        """Replace the graphs by quantised ones, if that is asked for."""
        if self.options.precision not in ("int8", "int4"):
            return
        files = {name: self.folder / graph.file for name, graph in self.graphs.items()}
        # Nothing else holds what was observed: samples are large, and smoothing copies them.
        quantisation = Quantisation(files, self.options.precision, self.observed(files))
        plan, studied = quantisation.default(), self.pictures[STUDIED]
        if studied and self.options.sensitivity:
            self.options.say("measuring how many bits layers need")
            show = partial(self.options.show, "choosing the precision of layers")
            aimed = min(self.largest_move, LARGEST_MOVES[self.options.precision])
            study = SensitivityStudy(quantisation, self.model, studied, aimed, show)
            plan = study.plan()
            self.report["sensitivity"] = study.table
            self.report["plans"] = study.plans
            chosen = study.plans[-1]
            kept = ", ".join(f"{chosen[kind]:.1%} in {kind}" for kind in BITS if chosen.get(kind))
            self.options.say(
                f"multiplications: {kept}; grades move by {chosen['grade_move']:.3f}, "
                f"preferences by {chosen['verdict_move']:.3f}"
            )
        self.options.say(f"rounding weights to {self.options.precision}")
        made = self.folder / "quantised"  # beside the graphs whose weights it reads
        made.mkdir()
        for name in files:
            save_graph(quantisation.graph(name, plan[name]), made / f"{name}.onnx")
        for file in made.iterdir():
            file.replace(self.folder / file.name)
        made.rmdir()

    def observed(self, files: Mapping[str, Path]) -> Mapping[str, Mapping[str, Observed]]:
        """Give what layers read of the pictures to calibrate on, by graph; empty without any."""
        if not self.pictures:
            return {}
        calibrated = self.pictures[CALIBRATED]
        # Where writing takes hours, a text that is read has to do.
        writes = PiecewiseSession(files["decoder"]).writes_quickly
        asked = "described, graded and compared" if writes else "graded and compared"
        self.options.say(f"observing activations: {len(calibrated)} photographs are {asked}")
        show = partial(self.options.show, "observing activations")
        return observe(
            files,
            lambda running: exercise(self.model(running), calibrated, show, writes=writes),
            self.options.precision,
        )

    def model(self, sessions: Mapping[str, GraphSession]) -> LocalModel:
        """Open the model on some sessions of its graphs."""
        decoder = GraphDecoder(sessions["decoder"], self.shape)
        return LocalModel(self.opened(), sessions["vision"], decoder)

    def opened(self) -> EnginePackage:
        """Open the package as far as it is made."""
        return EnginePackage.open(self.folder, verify=False)

    def check_grades(self, reference: Mapping[str, GraphSession]) -> None:
        """Compare the package with PyTorch on pictures, calibrated on others if there are any."""
        self.options.say("comparing grades of pictures with PyTorch")
        made = {name: PiecewiseSession(self.folder / f"{name}.onnx") for name in reference}
        held_out = self.pictures[CHECKED]
        pictures = held_out or self.pictures or synthetic_pictures(self.image)
        exact = grades_of(self.model(reference), pictures)

        def moves_of(model: LocalModel) -> NDArray[np.float64]:
            return np.abs(grades_of(model, pictures) - exact)

        moves = moves_of(self.model(made))
        mean = float(moves.mean())
        self.report["grades"] = {
            "pictures": len(pictures),
            "synthetic": not self.pictures,
            "held_out": bool(held_out),
            "mean_move": mean,
            "largest_move": float(moves.max()),
        }
        allowed = self.largest_move
        if not mean <= allowed:
            raise PackageCorrupted(
                f"{self.options.precision} moves the grades too much",
                seen=f"{mean:.3f} on average",
                allowed=f"{allowed} on the 1-5 scale",
                hint="give more and more varied pictures, or a higher --precision"
                + ("" if self.options.sensitivity else ", or leave out --no-sensitivity")
                + ", or accept it by --largest-move",
            )
        del made["decoder"]  # what the kernel packs takes as much memory
        if (decoder := self.decoder_in_bf16()) is not None:
            self.options.say("comparing grades in bf16")
            moved = float(moves_of(LocalModel(self.opened(), made["vision"], decoder)).mean())
            self.report["grades"]["mean_move_in_bf16"] = moved
            self.bf16 = moved <= allowed

    def decoder_in_bf16(self) -> NativeDecoder | None:
        """Open the layers in bf16, where less than fp32 was asked for and this processor can."""
        there = (self.folder / LAYERS_FILE).is_file() and KERNELS[FASTEST_IN_BF16].in_bf16
        if self.options.precision == "fp32" or not there:
            return None
        layers = layers_beside(self.folder / "decoder.onnx.data", FASTEST_IN_BF16)
        return NativeDecoder(*layers, usable_cores())

    def fit_key_projection(self) -> None:
        """Fit the linear map from visual tokens to a summary's key (ridge regression)."""
        wanted = self.options.key_pictures
        if wanted is None:
            decoder = PiecewiseSession(self.folder / "decoder.onnx")
            wanted = KEY_PICTURES if decoder.writes_quickly else 0
        pictures = self.pictures[:wanted]
        if not pictures:
            self.options.say(
                "no image key: photos without a description are not retrieved by likeness"
            )
            return
        self.options.say(f"describing {len(pictures)} pictures to fit the image key")
        model = LocalModel.open(self.opened())
        show = partial(self.options.show, "describing pictures")
        np.save(self.folder / "key_projection.npy", fitted_projection(model, pictures, show))

    def add_patterns(self) -> None:
        """Add the distortion patterns, if they lie beside the checkpoint's weights."""
        file = self.checkpoint.folder / FILE
        if file.is_file():
            self.options.say("adding the distortion patterns")
            write_patterns(TrainedPatterns.load(file), self.folder, self.pictures)

    def seal(self) -> None:
        """Write the manifest with the digests of all files."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
        files = {n: file_digest(self.folder / n) for n in names if n != "manifest.json"}
        graded = NEUTRAL_GRADED if self.options.score_head == "grm" else None
        manifest = Manifest(
            architecture=self.checkpoint.family.architecture,
            source=self.source,
            precision=self.options.precision,
            graphs=self.graphs,
            image=self.image,
            decoder=self.shape,
            prompt=self.prompt,
            calibration=replace(UNCALIBRATED, graded=graded),
            report=self.report,
            files=files,
            score_head=check_score_head(self.options.score_head),
            ends=self.ends,
            bf16=self.bf16,
        )
        write_manifest(self.folder, manifest)


def narrowed(image: ImageProcessing, max_pixels: int | None) -> ImageProcessing:
    if max_pixels is None:
        return image
    if not image.min_pixels <= max_pixels:
        raise UsageError(
            "--max-pixels is less than the model needs to see",
            seen=max_pixels,
            allowed=f"{image.min_pixels} or more",
        )
    return replace(image, max_pixels=max_pixels)


def synthetic_pictures(image: ImageProcessing) -> Pictures:
    """Draw gradients under noise of growing strength, for checks without photographs."""
    side = SYNTHETIC_SIDE // image.cell_pixels * image.cell_pixels or image.cell_pixels
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side)[:, None, None] * np.linspace(0.4, 1.0, 3)
    noises = rng.normal(size=(SYNTHETIC_PICTURES, side, side, 3))
    noisy = (ramp + 20.0 * index * noise for index, noise in enumerate(noises))
    return [np.clip(picture, 0, 255).astype(np.uint8) for picture in noisy]


def exercise(
    model: LocalModel, pictures: Pictures, show: Callable[[float], None], *, writes: bool
) -> None:
    """Ask everything that the engine asks: read, grade, compare and write, or read a description.

    A text that is read shows what layers see of one that is written, in a single call.
    """
    prefixes = model.prefill([model.encode(picture) for picture in pictures])
    for at, prefix in enumerate(prefixes):
        show(at / len(prefixes))
        other = prefixes[(at + 1) % len(prefixes)]
        model.grade(prefix)
        model.prefer_first([prefix], [other.tokens])
        if writes:
            limit = min(model.prompts.family.summary_tokens, OBSERVED_TOKENS)
            description = model.describe(prefix, limit)
            model.reflect(prefix, description.text, 3.5, 2.5)
        else:
            family = model.prompts.family
            reading = Asked(family.score + A_DESCRIPTION, family.verdicts)
            model.log_probabilities([prefix], [reading])


def fitted_projection(
    model: LocalModel, pictures: Pictures, show: Callable[[float], None]
) -> NDArray[np.float32]:
    """Fit the linear map (embed width + 1, D) from the mean visual token to a unit key."""
    tokens = [model.encode(picture) for picture in pictures]
    limit = model.prompts.family.summary_tokens
    keys = []
    for at, prefix in enumerate(model.prefill(tokens)):
        show(at / len(tokens))
        keys.append(model.describe(prefix, limit).key)
    known = [(t, key) for t, key in zip(tokens, keys, strict=True) if key is not None]
    if not known:
        raise PackageCorrupted("the model describes none of the pictures", seen="empty texts")
    means = np.stack([np.append(t.values.mean(axis=0), 1.0) for t, _ in known]).astype(np.float64)
    unit = np.stack([key / np.linalg.norm(key) for _, key in known])
    gram = means.T @ means + RIDGE * len(means) * np.eye(means.shape[1])
    projection: NDArray[np.float32] = np.linalg.solve(gram, means.T @ unit).astype(np.float32)
    return projection
