"""`jaxmodels families`."""

from __future__ import annotations

import argparse
import json

from jaxmodels.assets import PARITY
from jaxmodels.auto import FAMILIES, find_family

SHORT = {"AutoModel": "base", "AutoModelForCausalLM": "causal LM", "AutoModelForSequenceClassification": "sequence classification"}
SHORT |= {"AutoModelForTokenClassification": "token classification", "AutoModelForQuestionAnswering": "question answering"}
SHORT |= {"AutoModelForMaskedLM": "masked LM", "AutoModelForPreTraining": "pretraining", "AutoModelForMultipleChoice": "multiple choice"}
SHORT |= {"AutoModelForNextSentencePrediction": "next sentence"}
SHORT |= {"AutoModelForSeq2SeqLM": "sequence-to-sequence LM", "AutoModelForTextEncoding": "encoder"}
COLUMNS = ("logits", "torch float32 against float64, logits", "gradients", "bfloat16 error over torch's", "greedy tokens")


def families(args: argparse.Namespace) -> None:
    """A Markdown table: every family, its heads, and what the tests last recorded of its parity with torch."""
    rows = [("family", "heads", *COLUMNS), ("---",) * (2 + len(COLUMNS))]
    for name in sorted(FAMILIES):
        record = PARITY / f"{name}.json"
        found = json.loads(record.read_text()) if record.is_file() else {}
        heads = ", ".join(SHORT.get(task, task) for task in find_family(name).classes)
        rows.append((name, heads, *(str(found.get(column, "not recorded")) for column in COLUMNS)))
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
