"""Nouns all floors share: errors, requests, schedules, noise, passports, the store and file formats. Imports nothing above it."""
