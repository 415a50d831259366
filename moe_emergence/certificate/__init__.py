"""Whether a path through the experts computes what the sequential one does, figure by figure."""

from moe_emergence.certificate.arithmetic import (
    Arithmetic,
    available_dtypes,
    get_arithmetic,
)
from moe_emergence.certificate.cases import ACTIVATIONS, Case, grid, random_cases
from moe_emergence.certificate.certify import Certificate, Row, Status, certify
from moe_emergence.certificate.families import FAMILIES, Family
from moe_emergence.certificate.family_rows import certify_family
from moe_emergence.certificate.properties import Property, properties
from moe_emergence.certificate.report import certificate_table, describe_machine, summary_lines

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "Arithmetic",
    "Case",
    "Certificate",
    "Family",
    "Property",
    "Row",
    "Status",
    "available_dtypes",
    "certificate_table",
    "certify",
    "certify_family",
    "describe_machine",
    "get_arithmetic",
    "grid",
    "properties",
    "random_cases",
    "summary_lines",
]
