"""ATen: what one element of each op is, who writes which memory, and the shadow graph that is read."""

from . import (  # noqa: F401  (they fill element.RULES and the table of contracts)
    contracts_bits,
    contracts_float8,
    contracts_rows,
    contracts_scaled,
    definitions_gather,
    definitions_norms,
    definitions_pointwise,
    definitions_products,
    definitions_select,
    definitions_views,
)
