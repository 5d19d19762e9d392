"""All methods side by side on the bundled world; ``eval/leaderboard.py`` is its command."""
