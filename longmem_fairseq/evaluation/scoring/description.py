"""Description of a scorer's systems, for reports and to tell runs apart."""

import hashlib
from typing import Any, Dict

from ...data.manifest import dictionary_fingerprint


def describe(scorer) -> Dict[str, Any]:
    """Describe the weights, the sizes and the reading of a scorer's systems.

    Args:
        scorer: Scorer to describe.

    Returns:
        Values of plain JSON types, without paths.
    """
    description = {
        "backbone": scorer.backbone.config["model"],
        "backbone_fingerprint": scorer.backbone.fingerprint,
        "layers": scorer.backbone.num_layers,
        "width": scorer.backbone.width,
        "parameters": sum(p.numel() for p in scorer.backbone.parameters()),
        "tokens_per_sample": scorer.size,
        "memory_size": scorer.memory_size,
        "dictionary_sha256": dictionary_fingerprint(scorer.tokenizer.dictionary.symbols),
    }
    if scorer.decoder is None:
        return description
    cfg = scorer.decoder.cfg
    trained = [p for p in scorer.decoder.parameters() if p.requires_grad]
    weights = hashlib.sha256()
    for parameter in trained:
        weights.update(parameter.detach().float().cpu().numpy().tobytes())
    return {
        **description,
        "side_network_fingerprint": weights.hexdigest(),
        "side_network_parameters": sum(p.numel() for p in trained),
        "k": cfg.k,
        "chunk_size": cfg.chunk_size,
        "retrieval_layer_index": cfg.retrieval_layer_index,
        "mean_gate": round(float(scorer.decoder.gates.mean()), 4),
    }
