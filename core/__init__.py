"""What all floors share: errors, requests, schedules, noise, passports, store, file formats. Imports no other floor."""
