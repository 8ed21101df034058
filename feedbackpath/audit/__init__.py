"""The proof that a training step transports no weight: see ``audit``."""

from feedbackpath.audit.report import AuditError, Crossing, Finding, Report
from feedbackpath.audit.run import audit

__all__ = ["AuditError", "Crossing", "Finding", "Report", "audit"]
