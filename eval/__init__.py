"""Measures retrieval and answers, as users get them: it asks through the service's client and scores what comes back."""
