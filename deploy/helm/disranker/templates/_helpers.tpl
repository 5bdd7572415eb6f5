{{/* Names and labels. "part" is a dict: root (the chart's context) and component. */}}
{{- define "disranker.name" -}}{{ printf "%s-%s" (.root.Release.Name | trunc 40 | trimSuffix "-") .component }}{{- end }}

{{- define "disranker.selector" -}}
app.kubernetes.io/name: disranker
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "disranker.labels" -}}
{{ include "disranker.selector" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* What Prometheus calls the students of this release, less a canary's, whose pods have one word more. */}}
{{- define "disranker.stable" -}}
namespace={{ .root.Release.Namespace | quote }},pod=~"{{ include "disranker.name" . }}-[^-]+-[^-]+"
{{- end }}

{{- define "disranker.image" -}}{{ .name }}:{{ .tag }}{{- end }}

{{/* Pod Security Standard "restricted": the pod's half, with the account that it runs as, and the container's half. */}}
{{- define "disranker.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .uid }}
  runAsGroup: {{ .gid }}
  fsGroup: {{ .gid }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "disranker.container" -}}
imagePullPolicy: {{ .Values.images.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* Replicas on different nodes where there are some. */}}
{{- define "disranker.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "disranker.selector" . | nindent 8 }}
{{- end }}

{{/* Flags of a Triton that nobody may change without the key. An empty key ends the container. */}}
{{- define "disranker.guarded" -}}
KEY=$(cat /run/secrets/triton/key) && [ -n "$KEY" ] &&
GUARDED="model-repository,shared-memory,logging,trace:admin-key=$KEY" &&
{{- end }}

{{- define "disranker.experimentName" -}}experiments.yaml{{- end }}

{{/* A NetworkPolicy peer: the pods of one component. */}}
{{- define "disranker.peer" -}}
podSelector:
  matchLabels: {{- include "disranker.selector" . | nindent 4 }}
{{- end }}

{{/*
Environment of a program that sends spans. A caller's own decision counts; of other pages a share is traced.
*/}}
{{- define "disranker.tracing" -}}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .Values.tracing.endpoint | trimSuffix "/" | quote }}}
- {name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio}
- {name: OTEL_TRACES_SAMPLER_ARG, value: {{ .Values.tracing.ratio | quote }}}
{{- end }}
