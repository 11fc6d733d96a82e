"""The prompt layout as a Jinja template, for programs that render chats themselves.

It says what longllava.inputs.processor says, in text: each picture is one mark. Videos are left to the processor.
"""

from __future__ import annotations

import json

from longllava.config import PromptConfig
from longllava.inputs.chat import IMAGE_MARK

BODY = """
{%- for message in messages -%}
{%- if message.role not in ("user", "assistant") -%}
{{- raise_exception("role " + message.role + ": allowed are user and assistant") -}}
{%- endif -%}
{{- bos + (user if message.role == "user" else assistant) -}}
{%- set parts = [{"type": "text", "text": message.content}] if message.content is string else message.content -%}
{%- set text -%}
{%- for part in parts -%}
{%- if part.type == "image" and message.role == "user" -%}
{{- image -}}
{%- elif part.type == "text" -%}
{%- if not loop.first and loop.previtem.type == "image" and part.text and not part.text.startswith("\\n") -%}
{{- images_end -}}
{%- endif -%}
{{- part.text -}}
{%- else -%}
{{- raise_exception("a part of type " + part.type + ": allowed are text, and image in a user's message") -}}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{%- if message.role == "user" -%}
{{- text + user_end -}}
{%- else -%}
{%- generation -%}{{- text + (eos if loop.last else between_turns) -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- bos + assistant -}}{%- endif -%}
"""


def chat_template(prompt: PromptConfig, image: str = IMAGE_MARK) -> str:
    """Jinja as transformers renders it: variables messages and add_generation_prompt. image: a picture's mark."""
    between = prompt.eos_token if prompt.between_turns is None else prompt.between_turns
    values = {
        "bos": prompt.bos_token, "eos": prompt.eos_token, "user": prompt.user, "user_end": prompt.user_end,
        "assistant": prompt.assistant, "between_turns": between, "images_end": prompt.images_end,
        "image": prompt.image_open + image + prompt.image_close,
    }  # fmt: skip
    return (
        "".join(f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in values.items())
        + BODY[1:-1]
    )
