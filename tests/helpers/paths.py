"""Where the checkout, the fixtures and the programs of the tests are."""

from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
FIXTURES = HELPERS.parent / "fixtures"
