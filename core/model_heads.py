"""In which of transformers' auto mappings a class is looked up, by the end of its name."""

from __future__ import annotations

MAPPINGS_OF_HEADS = (
    ("ForCausalLM", ("MODEL_FOR_CAUSAL_LM_MAPPING",)),
    ("LMHeadModel", ("MODEL_FOR_CAUSAL_LM_MAPPING",)),
    ("ForConditionalGeneration", ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")),
    ("ForMaskedLM", ("MODEL_FOR_MASKED_LM_MAPPING",)),
    ("ForSequenceClassification", ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",)),
    ("ForTokenClassification", ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",)),
    ("ForQuestionAnswering", ("MODEL_FOR_QUESTION_ANSWERING_MAPPING",)),
)
DEFAULT_MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_MAPPING")
"""For a class with another name, or none."""
