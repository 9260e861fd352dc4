"""What is trained: tasks, their models and their losses. Nothing here knows how ranks exchange anything."""
