"""Promises that can be checked: mechanisms, events, accountants, the ledger and the gate."""
