"""Load a compressed model and talk to it; its weights stay packed in memory.

    python examples/chat.py runs/example                          # reads lines from the terminal until an empty one
    python examples/chat.py runs/example --prompt "The whale"     # answers once

A model without a chat template, such as the bundled one, continues the text.
"""

import argparse

import torch
from transformers import AutoTokenizer, TextStreamer

import eacmoe_lightning

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="a run directory of fit, or a compressed directory")
parser.add_argument("--prompt", help="answer this and exit")
parser.add_argument("--max_new_tokens", type=int, default=60)
parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest token")
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
options = parser.parse_args()

model = eacmoe_lightning.load(options.model).to(options.device)
tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
has_template = tokenizer.chat_template is not None
sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
messages: list[dict[str, str]] = []


def answer(text: str) -> None:
    """Prints the model's answer as it is generated."""
    messages.append({"role": "user", "content": text})
    if has_template:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(text, return_tensors="pt")
    inputs = inputs.to(options.device)
    streamer = TextStreamer(tokenizer, skip_prompt=has_template, skip_special_tokens=True)
    output = model.generate(**inputs, max_new_tokens=options.max_new_tokens, streamer=streamer, **sampling)
    reply = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    messages.append({"role": "assistant", "content": reply})


if options.prompt is not None:
    answer(options.prompt)
else:
    while line := input("> "):
        answer(line)
