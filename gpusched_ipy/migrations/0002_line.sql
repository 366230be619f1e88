-- A page of a long queue, and how many wait, without reading the jobs themselves.
CREATE INDEX jobs_line ON jobs (state, held, priority, submitted_at)
  WHERE state IN ('pending','starting','running');
