"""Checkpoint → verified engine package.

Everything is written into a folder beside the target and moved into place at the end, so an
interrupted or refused export leaves nothing half-written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.local import LocalVlm
from meiqa.engine.manifest import (
    NEUTRAL_GRADED,
    PRECISIONS,
    UNCALIBRATED,
    Graph,
    ImageProcessing,
    Manifest,
    check_score_head,
)
from meiqa.engine.package import EnginePackage, file_digest, write_manifest
from meiqa.engine.prompts import PromptFamily, Prompts, prompt_family
from meiqa.engine.runtime.base import GraphSession
from meiqa.engine.runtime.fused import LAYERS_FILE
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.errors import PackageCorrupted, PackageUnwritable, UsageError
from meiqa.export import patterns
from meiqa.export.checkpoint import Checkpoint
from meiqa.export.fused import LARGEST_SHARE, fused_difference, write_fused_layers
from meiqa.export.graphs import (
    Interface,
    decoder_graph,
    decoder_interface,
    save_graph,
    vision_graph,
    vision_interface,
)
from meiqa.export.half import halved
from meiqa.export.piecewise import PIECE_BYTES, PiecewiseSession
from meiqa.export.quantise import Assignment, Quantisation, observe
from meiqa.export.sensitivity import SensitivityStudy
from meiqa.export.temporary import LOCK, temporary_folder
from meiqa.export.verify import (
    TorchSession,
    decoder_feeds,
    largest_differences,
    mean_move,
    vision_feeds,
)
from meiqa.export.weights import digest_of, give_weights

RIDGE = 1e-2
CALIBRATED, STUDIED, CHECKED = slice(0, 40), slice(40, 80), slice(80, 120)
"""Which of the pictures ranges are observed on, layers' precisions chosen on, grades checked on."""
KEY_PICTURES = 256
OBSERVED_TOKENS = 96
"""Longest description while activations are observed; what follows looks alike."""
SYNTHETIC_PICTURES, SYNTHETIC_SIDE = 4, 256
PEAK_BYTES_A_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 9, "int4": 9}
"""Bytes of a weight on the disk when an export takes most: float graphs beside a trial of them."""
ABSOLUTE, RELATIVE = 1e-4, {"fp32": 1e-5, "fp16": 2e-2}
"""Each output may differ from PyTorch by so much, or by this share of its largest value."""
LARGEST_MOVES = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.03, "int4": 0.06}
"""Largest mean change of a grade, on the 1-5 scale, from PyTorch to the package."""

Pictures = Sequence[NDArray[np.uint8]]
Say = Callable[[str], None]


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
        say: told of each step.
    """

    precision: str = "int8"
    prompt: PromptFamily | None = None
    pictures: Sequence[ImageSource] = ()
    max_pixels: int | None = None
    sensitivity: bool = True
    key_pictures: int | None = None
    score_head: str = "text"
    say: Say = lambda step: None

    def __post_init__(self) -> None:
        check_score_head(self.score_head)
        if self.precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise UsageError("unknown precision", seen=self.precision, allowed=allowed)
        if self.precision == "int8" and not self.pictures:
            raise UsageError(
                "int8 needs photographs to calibrate on",
                seen="none",
                hint="give a folder with some dozens of them: --calibration DIR",
            )


def export_package(source: Path, out: Path, options: ExportOptions) -> EnginePackage:
    """Export a checkpoint.

    Args:
        source: folder in Hugging Face's layout.
        out: where the package goes; must not exist.

    Raises:
        UsageError: something is at `out`.
        PackageNotFound, PackageCorrupted: the checkpoint is incomplete or damaged, its architecture
            is not supported, or what was exported differs from PyTorch by more than the tolerance.
        PackageUnwritable: the disk is full or refuses to be written.
    """
    if out.exists():
        raise UsageError(f"{out} is there already", hint="remove it or choose another name")
    checkpoint = Checkpoint.open(source)
    with unfinished(out) as folder:
        require_space(checkpoint, folder, options.precision)
        Export(checkpoint, folder, options).write()
    return EnginePackage.open(out)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name when all went well and vanishes otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out.parent, f".{out.name}.partial-") as folder:
            yield folder
            (folder / LOCK).unlink()
            folder.chmod(0o755)
            folder.replace(out)
    except OSError as error:
        raise PackageUnwritable(
            f"{out} can't be written",
            seen=error.strerror or str(error),
            hint="see `df` and `ls -ld`",
        ) from error


def require_space(checkpoint: Checkpoint, folder: Path, precision: str) -> None:
    """Refuse at once what would fill the disk after minutes."""
    sizes = [tensor.numel() for tensor in checkpoint.weights.headers().values()]
    # The largest tensor, the embedding, is written as a file and, where it is tied, as a head.
    needed = (sum(sizes) + max(sizes)) * PEAK_BYTES_A_WEIGHT[precision]
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PackageUnwritable(
            f"there is too little space in {folder.parent}",
            seen=f"{free / 2**30:.1f} GiB",
            allowed=f"{needed / 2**30:.1f} GiB or more",
            hint="choose another place for --out",
        )


class Export:
    """One export, on its way into a folder."""

    def __init__(self, checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> None:
        self.checkpoint, self.folder, self.options = checkpoint, folder, options
        self.shape = checkpoint.decoder_shape
        self.image = narrowed(checkpoint.image, options.max_pixels)
        self.prompt = options.prompt or prompt_family(checkpoint.family.prompt)
        Prompts(self.prompt, checkpoint.tokenizer)  # refuses answers that are not single tokens
        self.report: dict[str, Any] = {}
        self.pictures = [fitted_to(load_pixels(p), self.image) for p in options.pictures]

    @property
    def interfaces(self) -> Mapping[str, Interface]:
        """Inputs and outputs of the graphs."""
        return {
            "vision": vision_interface(self.image, self.shape),
            "decoder": decoder_interface(self.shape),
        }

    @cached_property
    def source_digest(self) -> str:
        """SHA-256 of the checkpoint's weights."""
        return digest_of(self.checkpoint.folder)

    def write(self) -> None:
        """Write and verify everything."""
        reference = self.reference_sessions()
        self.write_graphs()
        self.check_graphs(reference)
        self.write_data()
        self.seal()
        self.quantise()
        if write_fused_layers(self.folder, self.checkpoint.text, self.options.precision):
            self.check_fused_layers()
        self.check_grades(reference)
        self.fit_key_projection()
        self.seal()
        self.add_patterns()

    def reference_sessions(self) -> Mapping[str, GraphSession]:
        """The checkpoint itself in PyTorch, its weights read when they are needed."""
        tower, decoder = self.checkpoint.tower(), self.checkpoint.decoder()
        give_weights(tower, self.checkpoint.tower_weight, PIECE_BYTES)
        give_weights(decoder, self.checkpoint.decoder_weight, PIECE_BYTES)
        return {
            "vision": TorchSession(tower, self.interfaces["vision"]),
            "decoder": TorchSession(decoder, self.interfaces["decoder"]),
        }

    def write_graphs(self) -> None:
        """Trace both graphs and write them, in half precision or in single."""
        model = self.checkpoint
        self.options.say("tracing the vision tower")
        self.save(
            "vision", vision_graph(model.tower(), self.interfaces["vision"], model.tower_weight)
        )
        self.options.say("tracing the decoder")
        self.save(
            "decoder",
            decoder_graph(model.decoder(), self.interfaces["decoder"], model.decoder_weight),
        )

    @property
    def float_precision(self) -> str:
        """What the graphs are before they are quantised."""
        return "fp16" if self.options.precision == "fp16" else "fp32"

    def save(self, name: str, graph: ir.Model) -> None:
        """Write a graph with its weights."""
        if self.float_precision == "fp16":
            halved(graph)
        save_graph(graph, self.folder / f"{name}.onnx")

    def check_graphs(self, reference: Mapping[str, GraphSession]) -> None:
        """Compare each graph with PyTorch on shapes that tracing has not seen."""
        feeds = {"vision": vision_feeds(self.image), "decoder": decoder_feeds(self.shape)}
        self.report["parity"] = {}
        for name, session in reference.items():
            self.options.say(f"comparing the {name} graph with PyTorch")
            made = PiecewiseSession(self.folder / f"{name}.onnx")
            found = largest_differences(session, made, feeds[name])
            self.report["parity"][name] = {
                output: {"difference": difference, "of": largest}
                for output, (difference, largest) in found.items()
            }
            for output, (difference, largest) in found.items():
                allowed = max(ABSOLUTE, RELATIVE[self.float_precision] * largest)
                if not difference <= allowed:
                    raise PackageCorrupted(
                        f"the exported {name} graph differs from PyTorch in {output}",
                        seen=f"{difference:.1e}",
                        allowed=f"{allowed:.0e}",
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
        files = {name: self.folder / f"{name}.onnx" for name in self.interfaces}
        observed = {}
        if self.pictures:
            calibrated = self.pictures[CALIBRATED]
            # Where each written token would read all weights again, questions have to do.
            writes = PiecewiseSession(files["decoder"]).whole
            asked = "described, graded and compared" if writes else "graded and compared"
            self.options.say(f"observing activations: {len(calibrated)} photographs are {asked}")
            observed = observe(
                files, lambda running: exercise(self.vlm(running), calibrated, writes=writes)
            )
        quantisation = Quantisation(files, self.options.precision, observed)
        plan = self.precisions(quantisation)
        self.options.say(f"rounding weights to {self.options.precision}")
        made = self.folder / "quantised"
        made.mkdir()
        for name in files:
            save_graph(quantisation.graph(name, plan[name]), made / f"{name}.onnx")
        for file in made.iterdir():
            file.replace(self.folder / file.name)
        made.rmdir()

    def check_fused_layers(self) -> None:
        """Compare the layers that are stored for the native kernel with the finished graph."""
        difference, largest = fused_difference(self.folder, self.shape)
        allowed = LARGEST_SHARE[self.options.precision] * largest
        if not difference <= allowed:
            raise PackageCorrupted(
                "the layers for the native kernel do not answer as the decoder graph does",
                seen=f"{difference:.1e}",
                allowed=f"{allowed:.0e}",
            )
        self.report["parity"][LAYERS_FILE] = {"logits": {"difference": difference, "of": largest}}

    def precisions(self, quantisation: Quantisation) -> Mapping[str, Assignment]:
        """Precision of each layer: measured, or by rule without pictures or time to do so."""
        studied = self.pictures[STUDIED]
        if not (studied and self.options.sensitivity):
            return quantisation.default()
        self.options.say("measuring how many bits each group of layers needs")
        study = SensitivityStudy(quantisation, self.vlm, studied, self.folder)
        plan = study.plan()
        self.report["sensitivity"] = study.table
        return plan

    def vlm(self, sessions: Mapping[str, GraphSession]) -> LocalVlm:
        """The model on some sessions of its graphs."""
        package = EnginePackage.open(self.folder, verify=False)
        return LocalVlm(package, sessions["vision"], sessions["decoder"])

    def check_grades(self, reference: Mapping[str, GraphSession]) -> None:
        """Compare the package with PyTorch on pictures, calibrated on others if there are any."""
        self.options.say("comparing grades of pictures with PyTorch")
        made = {name: PiecewiseSession(self.folder / f"{name}.onnx") for name in reference}
        pictures_given, held_out = bool(self.pictures), bool(self.pictures[CHECKED])
        checked = self.pictures[CHECKED] or self.pictures
        pictures = checked or synthetic_pictures(self.image)
        mean, largest = mean_move(self.vlm(reference), self.vlm(made), pictures)
        self.report["grades"] = {
            "pictures": len(pictures),
            "synthetic": not pictures_given,
            "held_out": held_out,
            "mean_move": mean,
            "largest_move": largest,
        }
        allowed = LARGEST_MOVES[self.options.precision]
        if not mean <= allowed:
            raise PackageCorrupted(
                f"{self.options.precision} moves the grades too much",
                seen=f"{mean:.3f} on average",
                allowed=f"{allowed} on the 1-5 scale",
                hint="give more and more varied pictures, or a higher --precision",
            )

    def fit_key_projection(self) -> None:
        """Fit the linear map from visual tokens to a summary's key (ridge regression)."""
        wanted = self.options.key_pictures
        if wanted is None:
            small = PiecewiseSession(self.folder / "decoder.onnx").whole
            wanted = KEY_PICTURES if small else 0
        pictures = self.pictures[:wanted]
        if not pictures:
            self.options.say(
                "no image key: photos without a description are not retrieved by likeness"
            )
            return
        self.options.say(f"describing {len(pictures)} pictures to fit the image key")
        package = EnginePackage.open(self.folder, verify=False)
        projection = fitted_projection(
            LocalVlm(package, *open_sessions(package, "cpu", None)), pictures
        )
        np.save(self.folder / "key_projection.npy", projection)

    def add_patterns(self) -> None:
        """Add the distortion patterns, if they lie beside the checkpoint's weights."""
        file = self.checkpoint.folder / patterns.FILE
        if file.is_file():
            self.options.say("adding the distortion patterns")
            patterns.add_patterns(patterns.TrainedPatterns.load(file), self.folder, self.pictures)

    def seal(self) -> None:
        """Write the manifest with the digests of all files."""
        names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
        files = {n: file_digest(self.folder / n) for n in names if n != "manifest.json"}
        graphs = {name: interface.as_graph(name) for name, interface in self.interfaces.items()}
        write_manifest(self.folder, self.manifest(graphs, files))

    def manifest(self, graphs: Mapping[str, Graph], files: Mapping[str, str]) -> Manifest:
        """Everything that is known about the package."""
        source = self.checkpoint.folder
        head = check_score_head(self.options.score_head)
        graded = head == "grm"
        return Manifest(
            architecture=self.checkpoint.family.architecture,
            source={"name": source.resolve().name, "sha256": self.source_digest},
            precision=self.options.precision,
            graphs=graphs,
            image=self.image,
            decoder=self.shape,
            prompt=self.prompt,
            calibration=replace(UNCALIBRATED, graded=NEUTRAL_GRADED) if graded else UNCALIBRATED,
            report=self.report,
            files=files,
            score_head=head,
        )


def narrowed(image: ImageProcessing, max_pixels: int | None) -> ImageProcessing:
    """Image processing with a smaller bound of the area."""
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
    """Gradients under noise of growing strength, for checks without photographs."""
    side = SYNTHETIC_SIDE // image.cell_pixels * image.cell_pixels or image.cell_pixels
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side)[:, None, None] * np.linspace(0.4, 1.0, 3)
    noises = rng.normal(size=(SYNTHETIC_PICTURES, side, side, 3))
    noisy = (ramp + 20.0 * index * noise for index, noise in enumerate(noises))
    return [np.clip(picture, 0, 255).astype(np.uint8) for picture in noisy]


def exercise(vlm: LocalVlm, pictures: Pictures, *, writes: bool) -> None:
    """Ask everything that the engine asks: read, grade, compare and, if told so, write."""
    prefixes = vlm.read([vlm.encode(picture) for picture in pictures])
    for prefix, other in zip(prefixes, prefixes[1:] + prefixes[:1], strict=True):
        vlm.grade(prefix)
        vlm.prefer_first([prefix], [other.tokens])
        if writes:
            limit = min(vlm.prompts.family.summary_tokens, OBSERVED_TOKENS)
            description = vlm.describe(prefix, limit)
            vlm.reflect(prefix, description.text, 3.5, 2.5)


def fitted_projection(vlm: LocalVlm, pictures: Pictures) -> NDArray[np.float32]:
    """Linear map (embed width + 1, D) from the mean of the visual tokens to a unit key.

    Raises:
        PackageCorrupted: the model describes none of the pictures.
    """
    tokens = [vlm.encode(picture) for picture in pictures]
    limit = vlm.prompts.family.summary_tokens
    keys = [vlm.describe(prefix, limit).key for prefix in vlm.read(tokens)]
    known = [(t, key) for t, key in zip(tokens, keys, strict=True) if key is not None]
    if not known:
        raise PackageCorrupted("the model describes none of the pictures", seen="empty texts")
    means = np.stack([np.append(t.values.mean(axis=0), 1.0) for t, _ in known]).astype(np.float64)
    unit = np.stack([key / np.linalg.norm(key) for _, key in known])
    gram = means.T @ means + RIDGE * len(means) * np.eye(means.shape[1])
    projection: NDArray[np.float32] = np.linalg.solve(gram, means.T @ unit).astype(np.float32)
    return projection
