"""The statements of PostgreSQL, one for each verb: what is decided is decided by the database, at once.

``{timeline}`` and what else stands in braces is filled in by :meth:`botlease.stores.postgres.PostgresStore.filled`.
"""

from __future__ import annotations

from typing import Final

from botlease.model import TRIES
from botlease.stores import KEEP_ENDED_DAYS

# Which incarnation of the database answers. The timeline changes with every promotion, and the function fails
# on a standby, so a stale replica can never be believed. Some hosted PostgreSQL do not have it.
TIMELINE: Final = "left(pg_walfile_name(pg_current_wal_lsn()), 8)"
NO_TIMELINE: Final = "'00000001'::text"

# In each statement that must not be lost, which are all but releases, farewells, a fleet's moves, heartbeats and
# tidying up: servers, databases and roles can have it off, and it can be changed under a session; behind a pooler each
# statement may be another session's.
# A grant that a crash of the server takes back is given to the next one as well (the simulation shows it); a renewal
# ends sooner for the others than for its holder; whoever has lost a claim that he won waits for ever; an update that
# was confirmed to the Bot API is gone.
DURABLE: Final = (
    "CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', TRUE) END"
)

# A time that is none ("infinity", by hand) cannot be subtracted, and one such row would blind everybody: CASE, as the
# order of what AND connects is the planner's.
READ: Final = """
WITH failed AS MATERIALIZED (SELECT deployment, failures FROM bot_failures WHERE bot = $1)
SELECT l.term, l.beat, l.nonce, l.holder, l.ttl, l.origin, l.proof, l.served,
       coalesce(l.paused OR l.fleet IS NOT NULL, FALSE) AS paused,
       (SELECT t.probation FROM bot_terms t WHERE t.bot = $1 AND t.term = l.term) AS probation,
       (SELECT t.how FROM bot_terms t WHERE t.bot = $1 AND t.how <> 'died' ORDER BY t.term DESC LIMIT 1) AS rooted,
       coalesce(mine.failures, 0) AS failures,
       (SELECT count(*) FROM bot_instances o
          LEFT JOIN failed f ON f.deployment = o.deployment
        WHERE o.bot = $1 AND o.ended_at IS NULL AND o.instance_id <> $2 AND coalesce(f.failures, 0) < {tries}
          AND CASE WHEN isfinite(o.last_heartbeat) THEN
            extract(epoch FROM clock_timestamp() - o.last_heartbeat)::float8 < 3 * coalesce(l.ttl, 10) END) AS others,
       CASE WHEN isfinite(l.renewed_at) THEN extract(epoch FROM clock_timestamp() - l.renewed_at)::float8 END
         AS renewed_ago,
       a.instance_id AS a_id, a.generation AS a_generation, a.ended_at IS NOT NULL AS a_ended, a.beat AS a_beat,
       CASE WHEN isfinite(a.last_heartbeat) THEN extract(epoch FROM clock_timestamp() - a.last_heartbeat)::float8 END
         AS a_age,
       me.generation AS my_generation, me.ended_at IS NOT NULL AS my_ended, {timeline} AS timeline,
       (SELECT count(*) FROM bot_instances o
          LEFT JOIN failed f ON f.deployment = o.deployment
        WHERE o.bot = $1 AND o.ended_at IS NULL AND NOT o.is_active AND o.instance_id <> $2
          AND (coalesce(f.failures, 0) >= {tries}, -coalesce(o.generation, 0), o.started_at, o.instance_id)
              < (coalesce(mine.failures, 0) >= {tries}, -me.generation, me.started_at, me.instance_id)
          AND CASE WHEN isfinite(o.last_heartbeat) THEN
            extract(epoch FROM clock_timestamp() - o.last_heartbeat)::float8 < 3 * coalesce(l.ttl, 10) END) AS ahead
FROM (SELECT 1) x LEFT JOIN bot_leases l ON l.bot = $1
     LEFT JOIN bot_instances a ON a.bot = $1 AND a.is_active
     LEFT JOIN bot_instances me ON me.instance_id = $2
     LEFT JOIN failed mine ON mine.deployment = me.deployment
"""

# A lease that is missing although the bot is known here, by a term or a deployment, was lost, and on a database that is
# not the one the schema was made in anything may have been lost: then it is put back as held by nobody we know, to be
# waited out in full (R6, R7). Terms go on above the highest that the journal or an instance still knows.
PRUNED_AT_ONCE: Final = 1000
"""Terms of the journal that one start deletes: some 10 ms of the server."""
REGISTER: Final = f"""
WITH deployed AS (
  INSERT INTO bot_deployments (bot, deployment, first_seen) VALUES ($1, $3, clock_timestamp())
  ON CONFLICT (bot, deployment) DO UPDATE SET first_seen = bot_deployments.first_seen RETURNING generation
), instance AS (
  INSERT INTO bot_instances (instance_id, started_at, last_heartbeat, is_active, bot, deployment, generation, host,
                             pid, state, version)
  SELECT $2, clock_timestamp(), clock_timestamp(), FALSE, $1, $3, generation, $4, $5, 'standby', $6 FROM deployed
  ON CONFLICT (instance_id) DO UPDATE SET generation = excluded.generation WHERE bot_instances.generation IS NULL
), lease AS (
  INSERT INTO bot_leases (bot, term, beat, nonce, holder, ttl, origin, proof, served, renewed_at)
  SELECT $1, greatest(max(term), (SELECT max(i.term) FROM bot_instances i WHERE i.bot = $1),
                      CASE WHEN $7 || {{timeline}} = (SELECT origin FROM botlease_schema) THEN 0 ELSE {{era}} END),
         0, $8, CASE WHEN new THEN NULL ELSE 'unknown' END,
         greatest($9, max(ttl) FILTER (WHERE released_at IS NULL)), $7 || {{timeline}},
         CASE WHEN new THEN '' ELSE '-' END, 0, clock_timestamp()
  FROM (SELECT NOT EXISTS (SELECT 1 FROM bot_terms WHERE bot = $1)
           AND NOT EXISTS (SELECT 1 FROM bot_deployments WHERE bot = $1)
           AND $7 || {{timeline}} = (SELECT origin FROM botlease_schema) AS new) known
       LEFT JOIN bot_terms ON bot = $1
  GROUP BY new
  ON CONFLICT (bot) DO NOTHING
), old_instances AS (
  DELETE FROM bot_instances
  WHERE last_heartbeat < clock_timestamp() - make_interval(days => $10) AND NOT is_active AND bot IS NOT NULL
), old_terms AS (
  -- A fleet writes tens of thousands in a roll-out: all of them at once would take longer than a start may.
  DELETE FROM bot_terms WHERE ctid = ANY(ARRAY(
    SELECT t.ctid FROM bot_terms t WHERE released_at < clock_timestamp() - make_interval(days => $10)
      AND term < (SELECT l.term FROM bot_leases l WHERE l.bot = t.bot) LIMIT {PRUNED_AT_ONCE}))
) SELECT generation, {DURABLE} FROM deployed
"""

# With its types: where others may create functions, one of the same name would make the call ambiguous.
CLAIM: Final = f"SELECT botlease_claim($1::text, $2::text, $3::text, $4::bigint, $5::bigint), {DURABLE}"

# The compare-and-set that begins a term, with its journal, in one statement. "old" is the row as the snapshot has it:
# had anybody changed it since, the key would not match; but for a release, after which the term is closed already.
ACQUIRE: Final = f"""
WITH old AS (
  SELECT renewed_at, ttl FROM bot_leases WHERE bot = $1
), got AS (
  UPDATE bot_leases SET
    term = greatest($7::bigint, term, (SELECT coalesce(max(t.term), 0) FROM bot_terms t WHERE t.bot = $1)) + 1,
    beat = 0, nonce = $8, holder = $2, ttl = $9, origin = $10 || {{timeline}}, proof = $11,
    renewed_at = clock_timestamp(),
    served = greatest(served, (SELECT generation FROM bot_instances WHERE instance_id = $2))
  WHERE bot = $1 AND term = $3 AND nonce = $5
    AND CASE WHEN $12 = 'released' AND $6::text IS NOT NULL THEN holder IS NULL AND proof = '' AND beat > $4
        ELSE beat = $4 AND holder IS NOT DISTINCT FROM $6 END
    AND NOT paused AND fleet IS NULL AND $10 || {{timeline}} = $14
    AND EXISTS (SELECT 1 FROM bot_instances WHERE instance_id = $2 AND bot = $1 AND is_active AND ended_at IS NULL)
  RETURNING term, origin, renewed_at
), closed AS (
  UPDATE bot_terms SET released_at = got.renewed_at, reason = $12, last_beat = old.renewed_at,
    ttl = coalesce(bot_terms.ttl, old.ttl)
  FROM old, got WHERE bot = $1 AND released_at IS NULL
), opened AS (
  INSERT INTO bot_terms (bot, term, instance_id, deployment, host, how, acquired_at, probation, ttl)
  SELECT $1, got.term, $2, i.deployment, i.host, $12, got.renewed_at, $13, $9
  FROM got, bot_instances i WHERE i.instance_id = $2
), buried AS (  -- the kernel proved it dead: it must not count as a standby
  UPDATE bot_instances SET state = 'stopped', stop_reason = $12, ended_at = clock_timestamp()
  WHERE $12 = 'died' AND instance_id = $6 AND ended_at IS NULL AND EXISTS (SELECT 1 FROM got)
), shown AS (
  UPDATE bot_instances SET term = (SELECT term FROM got), state = 'active', last_heartbeat = clock_timestamp(),
    beat = beat + 1
  WHERE instance_id = $2 AND EXISTS (SELECT 1 FROM got)
) SELECT term, origin, {DURABLE} FROM got
"""

RENEW: Final = f"""
UPDATE bot_leases SET beat = $6, renewed_at = clock_timestamp()
WHERE bot = $1 AND term = $3 AND nonce = $4 AND holder = $2 AND beat = ANY($5::bigint[])
RETURNING EXISTS (SELECT 1 FROM bot_instances WHERE instance_id = $2 AND is_active) AS assigned,
          NOT EXISTS (SELECT 1 FROM bot_instances a WHERE a.bot = $1 AND a.is_active) AS vacant,
          paused OR fleet IS NOT NULL AS paused, {{timeline}} AS timeline, {DURABLE}
"""

RENEW_AND_TOUCH: Final = f"""
WITH renewed AS ({RENEW}), free AS (  -- no renewal waits for an operator who has it in a transaction
  SELECT instance_id FROM bot_instances WHERE instance_id = $2 AND ended_at IS NULL FOR NO KEY UPDATE SKIP LOCKED
), touched AS (
  UPDATE bot_instances SET last_heartbeat = clock_timestamp(), beat = beat + 1, state = $7
  FROM free WHERE bot_instances.instance_id = free.instance_id AND EXISTS (SELECT 1 FROM renewed)
) SELECT * FROM renewed
"""

PASSED: Final = f"""
UPDATE bot_terms SET probation = 'passed' WHERE bot = $1 AND term = $3 AND probation <> ''
  AND EXISTS (SELECT 1 FROM bot_leases WHERE bot = $1 AND term = $3 AND nonce = $4 AND holder = $2)
RETURNING 1, {DURABLE}
"""

# The best live standby gets the assignment, if it is ours to give. With nobody to take it, it stays: a
# vacancy would mean that the operator wants nobody to run. The best: after a failed probation another deployment; then
# one that is not in quarantine; then the newest. One of an older deployment that was retired
# after ours had come (stopped by a signal, or superseded for good) and started again, when a stop signal ends us now,
# is a roll-back: left without its beat it counts as chosen by hand, and stays. A crash that was restarted is none.
# Locked in the same order as a claim does it: the lease, the one who gets the assignment, the one who has it. The
# other order deadlocks (measured: a second lost each time). "handed_on" reads from "me" so that our own row is written
# before the trigger takes our assignment away.
BEST: Final = """
best AS (
  SELECT o.instance_id, {reason} = 'stopped' AND o.generation < m.generation AND EXISTS (
    SELECT 1 FROM bot_deployments d, bot_instances earlier
    WHERE d.bot = $1 AND d.deployment = m.deployment AND earlier.bot = $1 AND earlier.deployment = o.deployment
      AND earlier.stop_reason IN ('stopped', 'superseded')
      AND earlier.ended_at BETWEEN d.first_seen AND o.started_at) AS back
  FROM bot_instances o JOIN bot_instances m ON m.instance_id = $2
    LEFT JOIN (SELECT deployment, failures FROM bot_failures WHERE bot = $1) f ON f.deployment = o.deployment
  WHERE {when} AND (SELECT count(*) FROM {lease}) >= 0 AND o.bot = $1 AND o.ended_at IS NULL AND o.instance_id <> $2
    AND CASE WHEN isfinite(o.last_heartbeat) THEN extract(epoch FROM clock_timestamp() - o.last_heartbeat)::float8
        < 3 * coalesce((SELECT ttl FROM bot_leases WHERE bot = $1), 10) END
    AND m.is_active
  ORDER BY {reason} = 'failed' AND o.deployment IS NOT DISTINCT FROM m.deployment,
    coalesce(f.failures, 0) >= {tries},
    coalesce(o.generation, 0) DESC, o.started_at LIMIT 1 FOR UPDATE OF o
), """
HAND_ON: Final = """
handed_on AS (
  UPDATE bot_instances SET is_active = TRUE, beat = beat + CASE WHEN best.back THEN 0 ELSE 1 END
  FROM best WHERE (SELECT bool_or(is_active) FROM me) AND bot_instances.instance_id = best.instance_id
)"""

# Nobody waits for the disk, nor for a synchronous standby: one that a crash of the server takes back has not happened,
# and the lease is waited out or given back by whoever had it. The acquire that follows does wait, and what stands
# before it in the log is written with it.
RELEASE: Final = (
    """
WITH gone AS (
  UPDATE bot_leases SET holder = NULL, proof = '', beat = beat + 1, renewed_at = clock_timestamp()
  WHERE bot = $1 AND term = $3 AND nonce = $4 AND holder = $2 AND beat = ANY($8::bigint[]) RETURNING 1
), closed AS (
  UPDATE bot_terms SET released_at = clock_timestamp(), reason = $5
  WHERE bot = $1 AND term = $3 AND EXISTS (SELECT 1 FROM gone)
), """
    + BEST.format(when="$6", lease="gone", reason="$5", tries=TRIES)
    + """
me AS (
  UPDATE bot_instances SET last_heartbeat = clock_timestamp(), beat = beat + 1,
    state = CASE WHEN $7 THEN 'stopped' ELSE 'passive' END,
    stop_reason = CASE WHEN $7 THEN $5 END, ended_at = CASE WHEN $7 THEN clock_timestamp() END
  WHERE instance_id = $2 AND ended_at IS NULL AND (SELECT count(*) FROM best) >= 0 RETURNING is_active
), """
    + HAND_ON
    + " SELECT EXISTS (SELECT 1 FROM gone) AS released, set_config('synchronous_commit', 'off', TRUE)"
)

LEAVE: Final = (
    """
WITH locked AS (
  SELECT 1 FROM bot_leases WHERE bot = $1 FOR UPDATE
), """
    + BEST.format(when="$4", lease="locked", reason="$3", tries=TRIES)
    + """
me AS (
  UPDATE bot_instances SET state = 'stopped', stop_reason = $3, ended_at = clock_timestamp(),
    last_heartbeat = clock_timestamp()
  WHERE instance_id = $2 AND ended_at IS NULL AND (SELECT count(*) FROM best) >= 0 RETURNING is_active
), """
    + HAND_ON
    + " SELECT 1"
)

TOUCH: Final = """
UPDATE bot_instances SET last_heartbeat = clock_timestamp(), beat = beat + 1, state = $2
WHERE instance_id = $1 AND ended_at IS NULL
"""
# Fires the triggers of a handover on rows of its own, which nobody sees: they are taken back by the same statement.
WARM: Final = """
DO $$
DECLARE me CONSTANT text := 'warm-' || md5(random()::text || clock_timestamp()::text);
BEGIN
  INSERT INTO bot_instances (instance_id, started_at, last_heartbeat, is_active, bot, deployment, generation, host,
                             pid, state, version)
  VALUES (me, clock_timestamp(), clock_timestamp(), FALSE, me, '', 0, '', 0, 'standby', '');
  INSERT INTO bot_leases (bot, term, beat, nonce, ttl, origin, proof, served, renewed_at)
  VALUES (me, 0, 0, '', 1, '', '', 0, clock_timestamp());
  INSERT INTO bot_terms (bot, term, instance_id, how, acquired_at, probation, ttl)
  VALUES (me, 1, me, 'released', clock_timestamp(), '', 1);
  UPDATE bot_instances SET is_active = TRUE WHERE instance_id = me;
  UPDATE bot_leases SET holder = me WHERE bot = me;
  UPDATE bot_terms SET released_at = clock_timestamp(), reason = 'stopped' WHERE bot = me;
  RAISE EXCEPTION USING ERRCODE = 'BL001';
EXCEPTION WHEN SQLSTATE 'BL001' THEN NULL;
END $$
"""
LEASES: Final = """
SELECT bot, term, beat, holder, ttl, renewed_at, paused, fleet, slot,
       CASE WHEN isfinite(renewed_at) THEN extract(epoch FROM clock_timestamp() - renewed_at)::float8 END AS silent
FROM bot_leases ORDER BY bot
"""
TERMS: Final = """
SELECT bot, term, instance_id, deployment, host, how, acquired_at, released_at, reason, probation, last_beat, ttl
FROM bot_terms WHERE ($1::text IS NULL OR bot = $1) ORDER BY bot, term DESC LIMIT $2
"""
FAILURES: Final = "SELECT bot, deployment, failures FROM bot_failures"
DEACTIVATE: Final = f"""
UPDATE bot_instances SET is_active = FALSE WHERE is_active AND bot IS NOT NULL
  AND ($1::text IS NULL OR bot = $1) AND ($2::text IS NULL OR instance_id = $2) RETURNING {DURABLE}
"""
# In one transaction, the lease's row first, as everybody locks. Anew, should it have the assignment already, as after a
# fail-over: else it would be no choice by hand, and the next start of a newer deployment would take it away.
PROMOTE: Final = (
    # Whoever is stopped in the middle of it must not keep the lease from its holder for hours.
    "SET LOCAL idle_in_transaction_session_timeout = '1s'",
    "SELECT 1 FROM bot_leases WHERE bot = (SELECT bot FROM bot_instances WHERE instance_id = $1) FOR UPDATE",
    "UPDATE bot_instances SET is_active = FALSE WHERE instance_id = $1 AND is_active",
    f"UPDATE bot_instances SET is_active = TRUE WHERE instance_id = $1 RETURNING {DURABLE}",
)
PAUSE: Final = (
    f"UPDATE bot_leases SET paused = $2 WHERE paused <> $2 AND ($1::text IS NULL OR bot = $1) RETURNING {DURABLE}"
)
PRUNE: Final = (
    # Never what lives: a standby gives a sign of life once in its ttl only.
    "DELETE FROM bot_instances i WHERE last_heartbeat < clock_timestamp() - make_interval(secs => $2) "
    "AND NOT is_active AND bot IS NOT NULL AND ($1::text IS NULL OR bot = $1) "
    "AND (ended_at IS NOT NULL OR last_heartbeat < clock_timestamp() "
    "- make_interval(secs => 3 * (SELECT coalesce(max(ttl), 60) FROM bot_leases l WHERE l.bot = i.bot)))",
    "DELETE FROM bot_terms WHERE ctid = ANY(ARRAY(SELECT t.ctid FROM bot_terms t "
    "WHERE released_at < clock_timestamp() - make_interval(secs => $2) AND ($1::text IS NULL OR bot = $1) "
    # What a quarantine rests on is kept for its time, however young the rest may be that goes.
    "AND (probation <> 'on' OR reason NOT IN ('failed', 'died', 'expired') "
    f"OR released_at < clock_timestamp() - make_interval(days => {KEEP_ENDED_DAYS})) "
    f"AND term < (SELECT l.term FROM bot_leases l WHERE l.bot = t.bot) LIMIT {10 * PRUNED_AT_ONCE}))",
)
INSTANCES: Final = """
SELECT bot, instance_id, is_active, state, term, deployment, generation, host, pid, started_at,
       last_heartbeat, stop_reason, ended_at, version,
       CASE WHEN isfinite(last_heartbeat) THEN extract(epoch FROM clock_timestamp() - last_heartbeat)::float8 END
         AS silent
FROM bot_instances ORDER BY bot, started_at
"""
