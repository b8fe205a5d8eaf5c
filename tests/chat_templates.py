"""Chat templates in the published formats of well-known models, written for these tests, and a tool."""

from typing import Literal

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- if tools is not none or system %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
{{- 'Environment: ipython\\n' }}
{%- endif %}
{{- 'Today Date: ' + (date_string if date_string is defined else '26 Jul 2024') + '\\n\\n' }}
{%- if tools is not none %}
    {{- 'You have access to the following functions.\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system }}{{ '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- elif message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message.role == 'assistant' %}
            {%- generation %}{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
        {%- else %}
            {{- message['content'] | trim }}{{ '<|eot_id|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and loop.last %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {%- if loop.first and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% for call in message.tool_calls or [] %}
<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson(sort_keys=true) }}
</tool_call>
{% endfor %}<|im_end|>{% endgeneration %}

{% else %}
{{ message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join }}{{ '<|im_end|>' }}

{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""

COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{%- set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{%- if system_message != false %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system_message + '<|END_OF_TURN_TOKEN|>' }}{% endif %}
{%- for message in loop_messages %}{% set content = message['content'] %}
{%- if message['role'] == 'user' %}{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- elif message['role'] == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

COMMAND_R_TOOL_USE = """{{ bos_token }}
{%- macro schema(type) -%}
{% if type == 'string' %}str{% elif type == 'integer' %}int{% elif type == 'number' %}float{% else %}{{ type }}{% endif %}
{%- endmacro -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># Safety Preamble
## Available Tools
{% for tool in tools %}{% if loop.index0 != 0 %}

{% endif %}```python
def {{ tool.function.name }}({% for name, field in tool.function.parameters.properties.items() %}
{{ ', ' if loop.index0 else '' }}{{ name }}: {{ schema(field.type) }}
{%- if name not in tool.function.parameters.required %} = None{% endif %}
{%- endfor %}) -> List[Dict]:
    \"\"\"{{ tool.function.description }}\"\"\"
    pass
```{% endfor %}<|END_OF_TURN_TOKEN|>
{%- for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' + message.role | upper }}
{%- if message.tool_calls %}Action: ```json
{{ message.tool_calls | map(attribute='function') | list | tojson(indent=2) }}```{% else %}{{ message.content }}{% endif %}
{%- endfor %}<|END_OF_TURN_TOKEN|>"""

COMMAND_R_RAG = """{{ bos_token }}<|SYSTEM_TOKEN|><results>
{% for document in documents %}Document: {{ loop.index0 }}
{% for key, value in document.items() %}{{ key }}: {{ value }}
{% endfor %}
{% endfor %}</results>{% for message in messages %}{{ '<|' ~ message.role ~ '|>' ~ message.content }}{% endfor %}
{%- if citation_mode == 'accurate' %}Carefully perform the following instructions{% endif %}"""

TEMPLATES = {"llama3": LLAMA3, "mistral": MISTRAL, "chatml": CHATML, "zephyr": ZEPHYR, "gemma": GEMMA, "command_r": COMMAND_R}
TEMPLATES |= {"command_r_tool_use": COMMAND_R_TOOL_USE, "command_r_rag": COMMAND_R_RAG}


def weather(city: str, unit: Literal["c", "f"] = "c", days: int | None = None) -> list[dict[str, float]]:
    """Looks up the weather.

    Args:
        city: The city, e.g.
            "Gdańsk".
        unit: Which unit (choices: ["c", "f"])
        days: How many days

    Returns:
        The forecast.
    """
    return [{city: 20.0}]
