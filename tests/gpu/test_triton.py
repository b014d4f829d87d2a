"""The tests of Triton's kernels that run in its interpreter elsewhere, compiled for the GPU."""

from tests.memory.interpreter import needs_triton
from tests.memory.test_triton_search import (  # noqa: F401
    test_any_floats,
    test_counters_are_read_on_the_device,
    test_equal_scores_are_listed_by_their_slots,
    test_finds_the_best_of_many,
    test_finds_the_largest_products,
    test_parts_change_nothing,
    test_queries_that_are_not_numbers_find_what_is_held,
)
from tests.modules.test_causal_attention import (  # noqa: F401
    test_equals_plain_attention_forward_and_backward,
    test_layers_attend_by_the_kernel,
)

pytestmark = needs_triton
