"""Any model tuned on a distilled set alone: of the run that made the set nothing else is read.

    nacd transfer --distilled runs/demo/distilled/seed0 --model.path demo-sibling --validation demo --out runs/sibling

The decoded prompts go in front of the samples as the target's own tokens, each tokenised by itself, so that no token
grows across the border. Results as of tune.py: <out>/adapter in peft's format, and log.json.
"""

import sys
from pathlib import Path

from . import tune
from .artifacts import folder_digest, read_json
from .config import DataConfig, TransferConfig
from .decode import survive
from .distilled import Distilled
from .errors import InputError
from .forms import read_set
from .student import load_tokenizer, model_digest


def prompts_of(distilled: Distilled, config: TransferConfig) -> tune.Prompts:
    """What goes in front of the samples. Raises InputError if embeddings are asked for and the model is another."""
    if config.prompts == "none":
        return None
    if config.prompts == "decoded":
        return distilled.texts
    learned_for = read_json(distilled.folder / "config.json")["inputs"]["model"]
    if model_digest(config.model.path) != learned_for:
        raise InputError(
            f"prompts='embeddings': they were learned for the model {distilled.made['model']['path']}, whose weights "
            f"are not those of {config.model.path}: must be 'decoded' for another model"
        )
    return distilled.prompts


def plan(config: TransferConfig, distilled: Distilled) -> str:
    """One sentence on what would be trained, and how many prompts the model's tokenizer spells otherwise."""
    text = f"tune {config.model.path} on {len(distilled.samples)} samples"
    if config.prompts == "decoded":
        changed = survive(distilled.texts, load_tokenizer(config.model.path)).count(False)
        text += f"; its tokenizer spells {changed} of their prompts otherwise"
    return text


def run(config: TransferConfig, distilled: Distilled) -> Path:
    """Tune `config.model` on the set. Returns the folder with the adapter."""
    return tune.run(
        Path(config.out),
        config.model,
        DataConfig(template=config.template, max_tokens=config.max_tokens),
        config.tune,
        distilled.examples(),
        read_set(config.validation, "validation"),
        config.seed,
        epochs=config.tune.epochs,
        prompts=prompts_of(distilled, config),
        inputs={"distilled": folder_digest(distilled.folder)},
        label=f"{config.model.path} on {distilled.folder}",
    )


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["transfer", *sys.argv[1:]]))
