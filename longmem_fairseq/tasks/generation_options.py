"""Options of generation that a language model with a memory cannot honor."""

_REFUSED = {
    "match_source_len": "there is no source whose length could be matched",
    "constraints": "prompts are continued freely",
    "print_alignment": "there is no source to align with",
    "score_reference": "fairseq-eval-lm scores documents",
}


def check_generation(args, models) -> None:
    """Refuse options that are not supported without an encoder, or that contradict each other.

    Args:
        args: fairseq's configuration of generation, or any object with some of its attributes.
        models: Models of the ensemble.

    Raises:
        ValueError: An option is not supported.
    """
    for option, reason in _REFUSED.items():
        if getattr(args, option, None):
            raise ValueError(f"--{option.replace('_', '-')} is not supported by a language model: {reason}")
    if getattr(args, "lm_path", None):
        raise ValueError(
            "--lm-path is not supported: the other model would not read the prompts; name both in --path a:b"
        )
    if getattr(args, "temperature", 1.0) <= 0:
        raise ValueError(f"--temperature {args.temperature} is not above 0: for the likeliest token use --beam 1")
    beam, nbest = getattr(args, "beam", 5), getattr(args, "nbest", 1)
    if beam < 1:
        raise ValueError(f"--beam {beam} is less than one hypothesis")
    if nbest > beam:
        raise ValueError(f"--nbest {nbest} is more than the {beam} hypotheses of --beam: raise --beam")
    longest, shortest = getattr(args, "max_len_b", 200), getattr(args, "min_len", 1)
    if not getattr(args, "max_len_a", 0) and shortest > longest:
        raise ValueError(f"--min-len {shortest} is more than --max-len-b {longest} new tokens: raise --max-len-b")
    stock = [type(model).__name__ for model in models if not hasattr(model, "memorize")]
    if stock:
        raise ValueError(f"--path names models with a memory and without ({stock[0]}): generate with one kind")
