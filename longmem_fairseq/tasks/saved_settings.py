"""Settings of a checkpoint in evaluation and generation: what the user gave wins, the rest is the checkpoint's."""

import ast
import difflib
import logging
from argparse import Namespace
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Set

from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf, open_dict

from ..safe_load import settings

logger = logging.getLogger(__name__)

ADOPTED = ("tokens_per_sample", "memory_scope")  # options of the task whose default is the checkpoint's value


def parse_overrides(text: Optional[str]) -> Dict[str, Any]:
    """Return the dictionary of ``--model-overrides``.

    Args:
        text: Value of the option, or None.

    Raises:
        ValueError: It is not a dictionary.
    """
    try:
        overrides = ast.literal_eval(text or "{}")
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"--model-overrides {text} is not a Python dictionary") from error
    if not isinstance(overrides, dict):
        raise ValueError(f"--model-overrides {text} is not a Python dictionary")
    return overrides


def suggestion(name: str, known: Iterable[str]) -> str:
    """Advise what to do about a setting that does not exist, as the end of a sentence.

    Args:
        name: Name of the setting.
        known: Names of all settings.
    """
    nearest = difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"did you mean {nearest[0]}?" if nearest else "leave it out"


class SavedSettings:
    """Settings of the checkpoints of ``--path`` for one command.

    Args:
        overrides: Settings of ``--model-overrides``.
        explicit: Those options in :data:`ADOPTED` that the user gave.
        from_checkpoint: Whether the task's configuration itself comes from the checkpoint, with the user's options
            already in it.

    Attributes:
        overrides: As above.
    """

    def __init__(self, overrides: Dict[str, Any], explicit: Sequence[str] = (), from_checkpoint: bool = False):
        self.overrides, self.explicit, self.from_checkpoint = overrides, explicit, from_checkpoint
        self._files: Iterator[Namespace] = iter(())
        self._adopted: Dict[str, Any] = {}

    @classmethod
    def of_command(cls, cfg, from_checkpoint: bool) -> "SavedSettings":
        """Read what the user gave from a task's configuration.

        Args:
            cfg: Configuration: ``model_overrides``, ``explicit_options`` and the options in :data:`ADOPTED`.
            from_checkpoint: As for the class.

        Raises:
            ValueError: ``--model-overrides`` is not a dictionary, or contradicts an option.
        """
        overrides = parse_overrides(cfg.model_overrides)
        given = () if from_checkpoint else cfg.explicit_options or ()
        explicit = [name for name in ADOPTED if name in given]
        for name in explicit:
            value = getattr(cfg, name)
            if str(overrides.get(name, value)) != str(value):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value} contradicts --model-overrides, which has {overrides[name]}: "
                    "leave one of them out"
                )
        return cls(overrides, explicit, from_checkpoint)

    def expect(self, states: List[Dict[str, Any]], task_settings: Set[str]) -> None:
        """Take the checkpoints that are about to be loaded, and check the names in ``--model-overrides``.

        Args:
            states: Contents of the checkpoints, in their order.
            task_settings: Names of the task's options, which ``fairseq-validate`` overrides too.

        Raises:
            ValueError: A name is unknown.
        """
        files = [settings(state) for state in states if state.get("cfg") or state.get("args")]
        for saved in files:
            known = {name for name in {*vars(saved), *_fields(saved)} if not name.startswith("_")}
            for name in self.overrides:
                if name in known or (name in task_settings and self.from_checkpoint):
                    continue
                option = f"give it as --{name.replace('_', '-')}" if name in task_settings else suggestion(name, known)
                raise ValueError(f"--model-overrides has {name}, which is not a setting of the model: {option}")
        self._files = iter(files)

    def apply(self, model_cfg, cfg) -> None:
        """Settle the settings of a checkpoint's model that is about to be built, and the task's.

        Args:
            model_cfg: Configuration of the model, with the overrides that fairseq applied; changed in place.
            cfg: Configuration of the task, changed in place.

        Raises:
            ValueError: The models of an ensemble have different settings.
        """
        saved = next(self._files, Namespace())
        has_memory = hasattr(_model_class(model_cfg), "memorize")
        for name in sorted(set(self.overrides) & _fields(model_cfg)):  # fairseq skips those that came later
            _set(model_cfg, name, self.overrides[name])
        for name in ADOPTED:
            value = safe_getattr(model_cfg, name, None)
            if name not in self.explicit and value is not None:
                self._adopt(cfg, name, value)
            if has_memory:
                _set(model_cfg, name, getattr(cfg, name))
            elif hasattr(saved, name):  # its positions are those that it was trained with
                _set(model_cfg, name, getattr(saved, name))

    def _adopt(self, cfg, name: str, value: Any) -> None:
        option = "--" + name.replace("_", "-")
        if str(self._adopted.setdefault(name, value)) != str(value):
            raise ValueError(
                f"the checkpoints of --path differ in {option} ({self._adopted[name]} and {value}): give the option"
            )
        if str(value) != str(getattr(cfg, name)):
            source = "from --model-overrides" if name in self.overrides else "from the checkpoint"
            logger.info("%s: %s, %s (another: give the option)", option, value, source)
            cfg[name] = value


def _set(cfg, name: str, value: Any) -> None:
    if OmegaConf.is_config(cfg):
        with open_dict(cfg):
            cfg[name] = value
    else:
        setattr(cfg, name, value)


def _model_class(cfg) -> type:
    name = _name_of(cfg)
    return ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)


def _fields(cfg) -> Set[str]:
    """Return the names of all settings that a model has in this version."""
    name = _name_of(cfg)
    dataclass = MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY.get(name, name))
    return set() if dataclass is None else set(dataclass.__dataclass_fields__)


def _name_of(cfg) -> Optional[str]:
    return safe_getattr(cfg, "_name", None) or safe_getattr(cfg, "arch", None)
