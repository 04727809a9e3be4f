"""The forms, by name. `make_form` is the one way to build one."""

from dtr_kernels.forms.base import Form, FormConfig, Operands, TeacherStatistics, TensorSpec
from dtr_kernels.forms.gated_deltanet import GatedDeltaNet
from dtr_kernels.forms.gla import GatedLinearAttention
from dtr_kernels.forms.hedgehog import Hedgehog
from dtr_kernels.forms.jet import Jet

FORMS: dict[str, type[Form]] = {form.name: form for form in (GatedDeltaNet, GatedLinearAttention, Jet, Hedgehog)}

__all__ = ["FORMS", "Form", "FormConfig", "Operands", "TeacherStatistics", "TensorSpec", "make_form"]


def make_form(name: str, config: FormConfig) -> Form:
    """The form called `name`; ValueError names those there are."""
    if name not in FORMS:
        raise ValueError(f"unknown form {name!r}: accepted are {', '.join(FORMS)}")
    return FORMS[name](config)
