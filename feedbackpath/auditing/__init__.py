"""The proof that a training step transports no weight: see ``audit``."""

from feedbackpath.auditing.report import AuditError, Crossing, Finding, Report
from feedbackpath.auditing.run import audit

__all__ = ["AuditError", "Crossing", "Finding", "Report", "audit"]
