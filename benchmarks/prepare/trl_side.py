"""TRL's tokenize-and-pack, as SFTTrainer does it before training; run by the Python of a virtual environment with TRL.

    python trl_side.py ROWS.jsonl MODEL SEQUENCE_LENGTH PROCESSES MASKED

Prints JSON: rows, real tokens, packing efficiency, tokens that are learnt. ROWS has a list `messages` a row; with
MASKED=1 only the last answer is learnt (conversational prompt and completion), with MASKED=0 all tokens are, which is
cheaper.
"""

import json
import sys
import tempfile


def main(rows: str, model: str, length: str, processes: str, masked: str) -> None:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        dataset = load_dataset("json", data_files=rows, split="train", cache_dir=folder)
        if masked == "1":
            dataset = dataset.map(
                lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
                remove_columns=["messages"],
                num_proc=int(processes),
            )
        tokenizer = AutoTokenizer.from_pretrained(model)
        arguments = SFTConfig(
            output_dir=f"{folder}/out", packing=True, max_length=int(length), dataset_num_proc=int(processes),
            report_to=[], use_cpu=True, bf16=False, completion_only_loss=masked == "1",
        )  # fmt: skip
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model),
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        packed = trainer.train_dataset
        tokens = sum(map(len, packed["input_ids"]))
        learnt = sum(label >= 0 for labels in packed["labels"] for label in labels)
    print(json.dumps({
        "rows": len(packed), "tokens": tokens, "learnt_tokens": learnt,
        "packing_efficiency": tokens / (len(packed) * int(length)),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
