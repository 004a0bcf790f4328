"""Why a solve goes as it goes: every solver's trace, what is wrong with f, and what to write."""

from deqcore.diagnosis._diagnose import Diagnosis, diagnose
from deqcore.diagnosis._findings import Finding
from deqcore.diagnosis._traces import Trace

__all__ = ["Diagnosis", "Finding", "Trace", "diagnose"]
