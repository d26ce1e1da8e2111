"""The model card of a converted checkpoint: base model, licence, recipe, error of each linear."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowmem.convert.recipe import Recipe
from lowmem.convert.stages.context import LinearReport

import lowmem
from lowmem.plan.fit.allocation import Allocation
from lowmem.text.units import format_bytes

OPENRAIL = "bigcode-openrail-m"


@dataclass(frozen=True)
class CardFacts:
    """The content of a model card. Nothing depends on the time or on interruptions: a resumed conversion
    gives the same bytes as an uninterrupted one."""

    base_model: str
    license_name: str | None
    license_files: tuple[str, ...]
    recipe: dict[str, Any]
    quantization: Recipe
    calibration: str
    calibration_shape: tuple[int, int]
    weights_bytes: int
    bits_per_weight: float
    reports: tuple[LinearReport, ...]
    made_for: str = ""
    """The size that the bits were chosen for, as the option that asks for it."""
    allocation: Allocation | None = None
    """How the bits were chosen, if they were made for a size."""

    @property
    def mean_error(self) -> float:
        """Mean relative output error of the linears."""
        return sum(r.error for r in self.reports) / len(self.reports)

    @property
    def title(self) -> str:
        """The widths in a word: "4-bit", or "mixed-bit" where linears differ."""
        return "mixed-bit" if self.quantization.linears else f"{self.quantization.config.bits}-bit"

    @property
    def widths(self) -> str:
        """The widths of the quantized linears, as "3, 4 and 8"."""
        configs = (self.quantization.of(report.name) for report in self.reports)
        *rest, last = sorted({config.bits for config in configs if config})
        return f"{', '.join(str(bits) for bits in rest)} and {last}" if rest else str(last)

    def stored(self, linear: str) -> str:
        """How a quantized linear is stored, as "4, g128"."""
        config = self.quantization.of(linear)
        assert config is not None
        group = "one group" if config.group_size == -1 else f"g{config.group_size}"
        return f"{config.bits}, {group}" + ("" if config.sym else ", asymmetric")

    def as_json(self) -> dict[str, Any]:
        """Convert to the content of lowmem-report.json."""
        return {
            "base_model": self.base_model,
            "license": self.license_name,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "bits_per_weight": self.bits_per_weight,
            "mean_error": self.mean_error,
            "linears": [asdict(r) for r in self.reports],
            **({"allocation": self._allocation(self.allocation)} if self.allocation else {}),
        }

    def _allocation(self, allocation: Allocation) -> dict[str, Any]:
        return {
            "made_for": self.made_for,
            "predicted_kld": allocation.predicted_kld,
            "linears": {
                name: {
                    "bits": format.bits,
                    "group_size": format.group_size,
                    "sym": format.sym,
                    "predicted_kld": allocation.costs[name],
                    "sensitivity": allocation.sensitivities[name],
                }
                for name, format in allocation.linears.items()
            },
        }


def render(facts: CardFacts) -> str:
    """Render the card in Markdown, with the front matter that the Hugging Face hub reads."""
    config, title = facts.quantization.config, facts.title
    group = "one group a row" if config.group_size == -1 else f"groups of {config.group_size} input columns"
    rows, length = facts.calibration_shape
    mixed = bool(facts.quantization.linears)
    front = ["---", f"base_model: {_yaml(facts.base_model)}", "base_model_relation: quantized"]
    if facts.license_name:
        front.append(f"license: {_yaml(facts.license_name)}")
    front += ["pipeline_tag: text-generation", "tags:", "- gptq", f"- {title}", "- lowmem", "---"]
    lines = [
        *front,
        "",
        f"# {facts.base_model}, {title} GPTQ",
        "",
        f"The linears of {facts.base_model}, quantized to {facts.widths} bits with GPTQ by lowmem "
        f"{lowmem.__version__}: {facts.bits_per_weight:.2f} bits a weight with scales and zero-points, "
        f"{format_bytes(facts.weights_bytes)} in all. Embeddings, norms, biases "
        "and head are kept in 16 bits.",
        "",
        "```sh",
        'lowmem run FOLDER -p "How do I sort a list in Python?"',
        "```",
        "",
        *_other_readers(facts),
        "## Licence",
        "",
        _licence(facts),
        "",
        "## Recipe",
        "",
        "| | |",
        "|---|---|",
        f"| bits | {facts.widths} |",
        *_chosen(facts),
        f"| groups | {group} |",
        f"| grid | {'symmetric' if config.sym else 'asymmetric'}; scales by a Hessian-weighted search |",
        f"| order of columns | {'act-order, groups static' if config.desc_act else 'as they are'} |",
        f"| damping | {config.damp_percent:g} of the mean of diag H |",
        f"| linears of a layer | {'one after the other' if config.true_sequential else 'all at once'} |",
        f"| correction of earlier errors | {config.correction if config.corrects else 0:g} |",
        f"| passes over each group's integers and scale | {config.passes} |",
        f"| steps of tuning integers, scales, biases and norms | {config.tune_steps} |",
        f"| calibration | {rows} rows of {length} tokens: {facts.calibration} |",
        f"| forward passes in | {facts.recipe.get('compute dtype')} |",
        "",
        "## Error of each linear",
        "",
        "Squared error of the outputs over the calibration tokens, as a share of their energy.",
        "",
        "| linear | shape | bits | error | notes |" if mixed else "| linear | shape | error | notes |",
        "|---|---|---|---|---|" if mixed else "|---|---|---|---|",
    ]
    for report in facts.reports:
        notes = "; ".join(report.warnings(config.damp_percent))
        shape = f"{report.in_features} → {report.out_features}"
        stored = f"{facts.stored(report.name)} | " if mixed else ""
        lines.append(f"| {report.name} | {shape} | {stored}{report.error:.3e} | {notes} |")
    if dense := [name for name, one in facts.quantization.linears.items() if one.dense]:
        lines += ["", f"In 16 bits: {', '.join(dense)}."]
    lines += ["", f"Mean: {facts.mean_error:.3e}.", ""]
    return "\n".join(lines)


def _chosen(facts: CardFacts) -> list[str]:
    """A row on how the bits were chosen, if they were made for a size."""
    if facts.allocation is None:
        return []
    return [
        f"| chosen | for `{facts.made_for}`, with the least predicted KL divergence: "
        f"{facts.allocation.predicted_kld:.2g} nats a token |"
    ]


def _other_readers(facts: CardFacts) -> list[str]:
    """Lines on the programs beside lowmem that load the checkpoint."""
    if facts.quantization.layout == "gptq_p":
        return [
            "GPTQModel loads it too. Its words are in the planar layout `gptq_p`, which holds 5, 6 and 7 "
            "bits and which optimum, transformers and vLLM do not read.",
            "",
        ]
    return [
        "Other readers of the GPTQ format, such as GPTQModel, load it too. So does transformers, "
        "with optimum and GPTQModel installed:",
        "",
        "```python",
        "import lowmem",
        "from transformers import pipeline",
        "",
        "lowmem.patch_transformers()  # only needed for gpt_bigcode: StarCoder, StarChat, SantaCoder",
        'pipe = pipeline("text-generation", model="FOLDER")',
        "```",
        "",
    ]


def _licence(facts: CardFacts) -> str:
    name = facts.license_name
    files = ", ".join(f"`{f}`" for f in facts.license_files)
    kept = f" Its text is in {files}." if files else ""
    if name == OPENRAIL:
        return (
            f"{OPENRAIL}, as the base model.{kept} Its use restrictions (Attachment A of the licence) bind "
            "every derivative, so this checkpoint and whatever is made with it: pass them on with it."
        )
    if name:
        return f"{name}, as the base model.{kept} Restrictions of its use hold for this checkpoint too."
    return (
        f"The base model's own, which its folder did not name.{kept} A quantized checkpoint is a derivative: "
        "look up the base model's licence before you pass this on. For StarChat Alpha and the StarCoder "
        f"family it is {OPENRAIL}, whose use restrictions travel with every derivative."
    )


def _yaml(text: str) -> str:
    plain = text.replace("-", "").replace("_", "").replace(".", "").replace("/", "")
    if plain.isalnum() and not plain.isdigit():
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
