"""Train any causal model on a distilled set with transformers and peft alone: nothing of this project is imported.

    python examples/train_on_distilled.py runs/demo/distilled/seed0 gpt2 my-adapter

The decoded prompt stands in front of each sample, tokenised by itself; the loss is on the response.
"""

import argparse
from typing import Any

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments


def tokenize(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """One sample: prompt, "User: ...", "Assistant:", and the response with the end of the text behind it."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    *context, reply = row["messages"]
    before = ids(row["prompt_text"])
    before += ids("".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in context) + "Assistant:")
    response = [*ids(f" {reply['content']}"), tokenizer.eos_token_id]
    input_ids = before + response
    return {
        "input_ids": input_ids,
        "attention_mask": [1] * len(input_ids),
        "labels": [-100] * len(before) + response,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distilled", help="folder of a distilled set")
    parser.add_argument("model", help="hub name or folder of a causal language model")
    parser.add_argument("adapter", help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()

    samples = load_dataset(args.distilled, split="train")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = samples.map(tokenize, fn_kwargs={"tokenizer": tokenizer}, remove_columns=samples.column_names)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model), lora)
    settings = TrainingArguments(
        output_dir=args.adapter,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
    )
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    result = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator).train()
    model.save_pretrained(args.adapter)
    steps = f"{args.steps} step{'s' if args.steps > 1 else ''}"
    print(f"{steps} on {len(rows)} samples, mean loss {result.training_loss:.3f}: {args.adapter}")


if __name__ == "__main__":
    main()
