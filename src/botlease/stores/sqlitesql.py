"""The statements of SQLite: several for a verb, in one transaction."""

from __future__ import annotations

from typing import Final

from botlease.model import TRIES

READ: Final = """
WITH failed AS MATERIALIZED (SELECT deployment, failures FROM bot_failures WHERE bot = :bot)
SELECT l.term, l.beat, l.nonce, l.holder, l.ttl, l.origin, l.proof, l.served, coalesce(l.paused, FALSE) AS paused,
       (SELECT t.probation FROM bot_terms t WHERE t.bot = :bot AND t.term = l.term) AS probation,
       (SELECT t.how FROM bot_terms t WHERE t.bot = :bot AND t.how <> 'died' ORDER BY t.term DESC LIMIT 1) AS rooted,
       coalesce(mine.failures, 0) AS failures,
       (SELECT count(*) FROM bot_instances o
          LEFT JOIN failed f ON f.deployment = o.deployment
        WHERE o.bot = :bot AND o.ended_at IS NULL AND o.instance_id <> :me AND coalesce(f.failures, 0) < {tries}
          AND (julianday(:now) - julianday(o.last_heartbeat)) * 86400.0 < 3 * coalesce(l.ttl, 10)) AS others,
       (julianday(:now) - julianday(l.renewed_at)) * 86400.0 AS renewed_ago,
       a.instance_id AS a_id, a.generation AS a_generation, a.ended_at IS NOT NULL AS a_ended, a.beat AS a_beat,
       (julianday(:now) - julianday(a.last_heartbeat)) * 86400.0 AS a_age,
       me.generation AS my_generation, me.ended_at IS NOT NULL AS my_ended,
       (SELECT count(*) FROM bot_instances o
          LEFT JOIN failed f ON f.deployment = o.deployment
        WHERE o.bot = :bot AND o.ended_at IS NULL AND NOT o.is_active AND o.instance_id <> :me
          AND (coalesce(f.failures, 0) >= {tries}, -coalesce(o.generation, 0), o.started_at, o.instance_id)
              < (coalesce(mine.failures, 0) >= {tries}, -me.generation, me.started_at, me.instance_id)
          AND (julianday(:now) - julianday(o.last_heartbeat)) * 86400.0 < 3 * coalesce(l.ttl, 10)) AS ahead
FROM (SELECT 1) LEFT JOIN bot_leases l ON l.bot = :bot
     LEFT JOIN bot_instances a ON a.bot = :bot AND a.is_active
     LEFT JOIN bot_instances me ON me.instance_id = :me
     LEFT JOIN failed mine ON mine.deployment = me.deployment
""".replace("{tries}", str(TRIES))

# Our row, our deployment's generation, the lease (its ttl: that of the term which may still run, if longer). A lease
# that is missing although the journal knows terms of this bot was lost, and on a database that is not the one the
# schema was made in anything may have been lost: then it is put back as held by nobody we know, to be waited out in
# full (R6, R7).
ADD_DEPLOYMENT: Final = (
    "INSERT INTO bot_deployments (bot, deployment, first_seen) VALUES (:bot, :deployment, :now) ON CONFLICT DO NOTHING"
)
ADD_INSTANCE: Final = """
INSERT INTO bot_instances (instance_id, started_at, last_heartbeat, is_active, bot, deployment, generation, host, pid,
                           state, version)
SELECT :me, :now, :now, FALSE, :bot, :deployment, generation, :host, :pid, 'standby', :version
FROM bot_deployments WHERE bot = :bot AND deployment = :deployment
ON CONFLICT (instance_id) DO UPDATE SET generation = excluded.generation WHERE generation IS NULL
"""
ADD_LEASE: Final = """
INSERT INTO bot_leases (bot, term, beat, nonce, holder, ttl, origin, proof, served, renewed_at)
SELECT :bot, max(coalesce(max(term), 0), coalesce((SELECT max(i.term) FROM bot_instances i WHERE i.bot = :bot), 0),
                 CASE WHEN :origin = (SELECT origin FROM botlease_schema) THEN 0 ELSE :era END),
       0, :nonce, CASE WHEN new THEN NULL ELSE 'unknown' END,
       max(:ttl, coalesce(max(CASE WHEN released_at IS NULL THEN ttl END), 0)), :origin,
       CASE WHEN new THEN '' ELSE '-' END, 0, :now
FROM (SELECT NOT EXISTS (SELECT 1 FROM bot_terms WHERE bot = :bot)
         AND NOT EXISTS (SELECT 1 FROM bot_deployments WHERE bot = :bot)
         AND :origin = (SELECT origin FROM botlease_schema) AS new)
     LEFT JOIN bot_terms ON bot = :bot
WHERE TRUE GROUP BY new
ON CONFLICT DO NOTHING
"""
PRUNE: Final = (
    # One that was killed has no end, only a last heartbeat.
    "DELETE FROM bot_instances WHERE last_heartbeat < :old AND NOT is_active AND bot IS NOT NULL "
    "AND (:bot IS NULL OR bot = :bot) AND (ended_at IS NOT NULL OR last_heartbeat < :alive)",
    # What a quarantine rests on is kept for its time, however young the rest may be that goes.
    "DELETE FROM bot_terms WHERE released_at < :old AND (:bot IS NULL OR bot = :bot) "
    "AND (probation <> 'on' OR reason NOT IN ('failed', 'died', 'expired') OR released_at < :kept) "
    "AND term < (SELECT term FROM bot_leases l WHERE l.bot = bot_terms.bot)",
)
DEACTIVATE: Final = (
    "UPDATE bot_instances SET is_active = FALSE WHERE is_active AND bot IS NOT NULL "
    "AND (:bot IS NULL OR bot = :bot) AND (:me IS NULL OR instance_id = :me)"
)
PAUSE: Final = "UPDATE bot_leases SET paused = :on WHERE paused <> :on AND (:bot IS NULL OR bot = :bot)"

CLAIM: Final = """
UPDATE bot_instances SET is_active = TRUE, beat = beat + 1
WHERE instance_id = :me AND ended_at IS NULL
  AND (SELECT count(*) FROM bot_instances a WHERE a.bot = :bot AND a.is_active) = (:source IS NOT NULL)
  AND (:source IS NULL OR EXISTS (
    SELECT 1 FROM bot_instances a WHERE a.bot = :bot AND a.is_active AND a.instance_id = :source
      AND coalesce(a.generation, 0) = :generation AND a.beat = :beat))
"""

# The compare-and-set that begins a term.
ACQUIRE: Final = """
UPDATE bot_leases SET
  term = max(:floor, term, (SELECT coalesce(max(t.term), 0) FROM bot_terms t WHERE t.bot = :bot)) + 1,
  beat = 0, nonce = :new, holder = :me, ttl = :ttl, origin = :origin, proof = :proof, renewed_at = :now,
  served = max(served, (SELECT generation FROM bot_instances WHERE instance_id = :me))
WHERE bot = :bot AND term = :term AND nonce = :nonce
  AND CASE WHEN :how = 'released' AND :holder IS NOT NULL THEN holder IS NULL AND proof = '' AND beat > :beat
      ELSE beat = :beat AND holder IS :holder END
  AND NOT paused AND :origin = :seen
  AND EXISTS (SELECT 1 FROM bot_instances WHERE instance_id = :me AND bot = :bot AND is_active AND ended_at IS NULL)
RETURNING term
"""
LAST_BEAT: Final = "SELECT renewed_at, ttl FROM bot_leases WHERE bot = :bot"
CLOSE_OLD_TERM: Final = (
    "UPDATE bot_terms SET released_at = :now, reason = :how, last_beat = :last_beat, ttl = coalesce(ttl, :old_ttl) "
    "WHERE bot = :bot AND term < :term AND released_at IS NULL"
)
OPEN_TERM: Final = """
INSERT INTO bot_terms (bot, term, instance_id, deployment, host, how, acquired_at, probation, ttl)
SELECT :bot, :term, :me, deployment, host, :how, :now, :probation, :ttl FROM bot_instances WHERE instance_id = :me
"""
PASSED: Final = """
UPDATE bot_terms SET probation = 'passed' WHERE bot = :bot AND term = :term AND probation <> ''
  AND EXISTS (SELECT 1 FROM bot_leases WHERE bot = :bot AND term = :term AND nonce = :nonce AND holder = :me)
"""
SHOW_TERM: Final = (
    "UPDATE bot_instances SET term = :term, state = 'active', last_heartbeat = :now, beat = beat + 1 "
    "WHERE instance_id = :me"
)

# The kernel proved it: that instance is no more, and must not count as a standby.
BURY: Final = (
    "UPDATE bot_instances SET state = 'stopped', stop_reason = :how, ended_at = :now "
    "WHERE instance_id = :holder AND ended_at IS NULL"
)

RENEW: Final = """
UPDATE bot_leases SET beat = :beat, renewed_at = :now
WHERE bot = :bot AND term = :term AND nonce = :nonce AND holder = :me AND instr(:beats, ',' || beat || ',') > 0
RETURNING EXISTS (SELECT 1 FROM bot_instances WHERE instance_id = :me AND is_active) AS assigned,
          NOT EXISTS (SELECT 1 FROM bot_instances a WHERE a.bot = :bot AND a.is_active) AS vacant, paused
"""

RELEASE: Final = """
UPDATE bot_leases SET holder = NULL, proof = '', beat = beat + 1, renewed_at = :now
WHERE bot = :bot AND term = :term AND nonce = :nonce AND holder = :me AND instr(:beats, ',' || beat || ',') > 0
"""
CLOSE_TERM: Final = "UPDATE bot_terms SET released_at = :now, reason = :reason WHERE bot = :bot AND term = :term"
SHOW_STANDBY: Final = (
    "UPDATE bot_instances SET state = 'passive', last_heartbeat = :now, beat = beat + 1 WHERE instance_id = :me"
)
END: Final = (
    "UPDATE bot_instances SET state = 'stopped', stop_reason = :reason, ended_at = :now, last_heartbeat = :now "
    "WHERE instance_id = :me AND ended_at IS NULL"
)
# The best live standby gets the assignment, if it is ours to give. With nobody to take it, it stays: a
# vacancy would mean that the operator wants nobody to run. The best: after a failed probation another deployment; then
# one that is not in quarantine; then the newest. One of an older deployment that was retired
# after ours had come (stopped by a signal, or superseded for good) and started again, when a stop signal ends us now,
# is a roll-back: left without its beat it counts as chosen by hand, and stays. A crash that was restarted is none.
HAND_ON: Final = """
UPDATE bot_instances SET is_active = TRUE, beat = beat + CASE WHEN :reason = 'stopped' AND EXISTS (
    SELECT 1 FROM bot_instances me, bot_deployments d, bot_instances earlier
    WHERE me.instance_id = :me AND bot_instances.generation < me.generation
      AND d.bot = :bot AND d.deployment = me.deployment
      AND earlier.bot = :bot AND earlier.deployment = bot_instances.deployment
      AND earlier.stop_reason IN ('stopped', 'superseded')
      AND earlier.ended_at BETWEEN d.first_seen AND bot_instances.started_at)
  THEN 0 ELSE 1 END
WHERE instance_id = (
  SELECT o.instance_id FROM bot_instances o
    LEFT JOIN (SELECT deployment, failures FROM bot_failures WHERE bot = :bot) f ON f.deployment = o.deployment
  WHERE o.bot = :bot AND o.ended_at IS NULL AND o.instance_id <> :me
    AND (julianday(:now) - julianday(o.last_heartbeat)) * 86400.0
        < 3 * coalesce((SELECT ttl FROM bot_leases WHERE bot = :bot), 10)
  ORDER BY :reason = 'failed' AND o.deployment = (SELECT deployment FROM bot_instances WHERE instance_id = :me),
    coalesce(f.failures, 0) >= {tries}, coalesce(o.generation, 0) DESC, o.started_at LIMIT 1)
AND EXISTS (SELECT 1 FROM bot_instances WHERE instance_id = :me AND is_active)
""".replace("{tries}", str(TRIES))

TOUCH: Final = (
    "UPDATE bot_instances SET last_heartbeat = :now, beat = beat + 1, state = :state "
    "WHERE instance_id = :me AND ended_at IS NULL"
)
LEASES: Final = """
SELECT bot, term, beat, holder, ttl, renewed_at, paused,
       (julianday(:now) - julianday(renewed_at)) * 86400.0 AS silent
FROM bot_leases ORDER BY bot
"""
TERMS: Final = """
SELECT bot, term, instance_id, deployment, host, how, acquired_at, released_at, reason, probation, last_beat, ttl
FROM bot_terms WHERE (:bot IS NULL OR bot = :bot) ORDER BY bot, term DESC LIMIT :limit
"""
FAILURES: Final = "SELECT bot, deployment, failures FROM bot_failures"
INSTANCES: Final = """
SELECT bot, instance_id, is_active, state, term, deployment, generation, host, pid, started_at,
       last_heartbeat, stop_reason, ended_at, version,
       (julianday(:now) - julianday(last_heartbeat)) * 86400.0 AS silent
FROM bot_instances ORDER BY bot, started_at
"""
