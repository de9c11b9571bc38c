"""Speech: reading audio and manifests, transcribing, aligning, and scoring what was heard."""
