"""A plain TRL script: `python benchmarks/tune_plain.py MODEL ROWS OUT JSON`, as anybody would write it. Prints what it measured.

What `benchmarks.tune_speed` compares `graft tune sft-lora` with. JSON: the data type, and the trainer's arguments.
"""

import json
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model, rows, out, given = sys.argv[1:]
options = json.loads(given)
dtype, arguments = options["dtype"], options["arguments"]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
    args=SFTConfig(
        output_dir=out,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        **arguments,
    ),
    train_dataset=load_dataset("json", data_files=rows, split="train", cache_dir=f"{out}/cache").select_columns(
        ["prompt", "completion"]
    ),
    processing_class=AutoTokenizer.from_pretrained(model),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trained = trainer.train()
losses = [point["loss"] for point in trainer.state.log_history if "loss" in point]
print(
    json.dumps(
        {
            "seconds": trained.metrics["train_runtime"],
            "tokens": trainer.state.num_input_tokens_seen,
            "losses": losses,
        }
    )
)
